"""Requests through the real planner and block manager, on a worker that takes no time: for what the cache keeps."""

import itertools
from collections.abc import Iterable, Sequence

from scheduler.admitter import PlannerLimits
from scheduler.block_hash import root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner
from scheduler.sequence import Sequence as Running
from scheduler.sequence import SequenceLimits

BLOCK_SIZE = 16
NUM_AT_ONCE = 4
NUM_OUTPUT_TOKENS = 2
Prompt = Sequence[int]


class Pool:
    """One worker's pool; requests come a few at once and are served to their ends."""

    def __init__(
        self,
        num_blocks: int,
        max_num_seqs: int = NUM_AT_ONCE,
        max_num_batched_tokens: int = 4096,
        overcommit: float = 1.0,
    ) -> None:
        self._limits = PlannerLimits(BLOCK_SIZE, max_num_seqs, max_num_batched_tokens, overcommit)
        self.blocks = BlockManager(num_blocks, Changes())
        self.planner = self._planner()
        self._seq_ids = itertools.count(1)

    def _planner(self) -> Planner:
        return Planner(self._limits, self.blocks)

    def rebuild(self) -> None:
        """Another scheduler takes over: the mirror is what Redis knows."""
        self.blocks = BlockManager.from_image(self.blocks.image(), Changes())
        self.planner = self._planner()

    def serve(self, prompts: Iterable[Prompt]) -> list[float]:
        """Of each prompt, in order, the share of its tokens that were hits."""
        shares: list[float] = []
        arriving = iter(prompts)
        while batch := list(itertools.islice(arriving, NUM_AT_ONCE)):
            sequences = [self.open(prompt) for prompt in batch]
            self.finish()
            shares += [(s.num_cached_tokens or 0) / s.num_prompt_tokens for s in sequences]
            self.blocks.changes.take()
        self.blocks.check([])
        return shares

    def open(self, prompt: Prompt, num_choices: int = 1) -> Running:
        """A request arrives; the sequence of its first choice."""
        limits = SequenceLimits(NUM_OUTPUT_TOKENS, frozenset(), ignores_eos=True)
        root = root_hash("model", "float32", "", "")
        seq_ids = [next(self._seq_ids) for _ in range(num_choices)]
        leader, *followers = [
            Running(seq_id, f"r{seq_ids[0]}", choice, list(prompt), len(prompt), limits, root)
            for choice, seq_id in enumerate(seq_ids)
        ]
        self.planner.enqueue(leader)
        for follower in followers:
            self.planner.enqueue(follower, leader)
        return leader

    def finish(self) -> None:
        """Serves whatever there is to its end."""
        while self.planner.num_waiting or self.planner.running:
            self.step()

    def step(self) -> None:
        """One step, from the reservation to the result."""
        planner = self.planner
        self._reserve()
        rows = planner.schedule()
        if planner.forks.num_begun:
            self._reserve()
        for row in rows:
            sequence = row.sequence
            sequence.num_plans_in_flight -= 1
            if row.num_tokens:  # else a fork: it samples from its leader's prompt
                sequence.num_computed_tokens += row.num_tokens
            if row.num_samples:
                sequence.num_planned_samples -= 1
                sequence.token_ids.append(1)
            planner.publish_computed(sequence)
            if sequence.num_output_tokens == NUM_OUTPUT_TOKENS:
                planner.finish(sequence)

    def _reserve(self) -> None:
        planner = self.planner
        planner.grow_and_admit(1)
        for sequence in planner.reserved:
            sequence.num_acked_blocks = len(sequence.block_ids)
        for told in (planner.reserved, planner.redescribed, planner.removed, self.blocks.freed_block_ids):
            told.clear()


def prompts(first: int, count: int, num_blocks: int) -> list[Prompt]:
    """Prompts of so many full blocks and one token, that differ from their first token on."""
    return [[first + i] * (num_blocks * BLOCK_SIZE + 1) for i in range(count)]
