"""Requests through the real planner and block manager, on a worker that takes no time: for what the cache keeps."""

import itertools
from collections.abc import Iterable, Sequence

from scheduler.block_hash import root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner, PlannerLimits
from scheduler.sequence import Sequence as Running
from scheduler.sequence import SequenceLimits

BLOCK_SIZE = 16
NUM_AT_ONCE = 4
NUM_OUTPUT_TOKENS = 2
Prompt = Sequence[int]


class Pool:
    """One worker's pool; requests come a few at once and are served to their ends."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, Changes())
        self.planner = self._planner()
        self._seq_ids = itertools.count(1)

    def _planner(self) -> Planner:
        return Planner(PlannerLimits(BLOCK_SIZE, NUM_AT_ONCE, 4096, 1.0), self.blocks)

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
            while self.planner.waiting or self.planner.running:
                self.step()
            shares += [(s.num_cached_tokens or 0) / s.num_prompt_tokens for s in sequences]
            self.blocks.changes.take()
        self.blocks.check([])
        return shares

    def open(self, prompt: Prompt) -> Running:
        """A request arrives."""
        seq_id = next(self._seq_ids)
        limits = SequenceLimits(NUM_OUTPUT_TOKENS, frozenset(), ignores_eos=True)
        root = root_hash("model", "float32", "", "")
        sequence = Running(seq_id, f"r{seq_id}", 0, list(prompt), len(prompt), limits, root)
        self.planner.enqueue(sequence)
        return sequence

    def step(self) -> None:
        """One step, from the reservation to the result."""
        planner = self.planner
        planner.grow_and_admit(1)
        for sequence in planner.reserved:
            sequence.num_acked_blocks = len(sequence.block_ids)
        for rows in (planner.reserved, planner.redescribed, planner.removed, self.blocks.freed_block_ids):
            rows.clear()
        for row in planner.schedule():
            sequence = row.sequence
            sequence.num_plans_in_flight -= 1
            sequence.num_computed_tokens += row.num_tokens
            if row.samples:
                sequence.num_planned_samples -= 1
                sequence.token_ids.append(1)
            planner.publish_computed(sequence)
            if sequence.num_output_tokens == NUM_OUTPUT_TOKENS:
                planner.finish(sequence)


def prompts(first: int, count: int, num_blocks: int) -> list[Prompt]:
    """Prompts of so many full blocks and one token, that differ from their first token on."""
    return [[first + i] * (num_blocks * BLOCK_SIZE + 1) for i in range(count)]
