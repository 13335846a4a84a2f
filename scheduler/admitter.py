"""Who of the waiting may run next, and on which blocks: by their order, the room there is, and who computes what. Pure.

Single flight: a prefix that a running sequence is computing is waited for, not computed twice. Between workers the
choice of a worker sees to that (`worker_choice`); what it needs to know of this one is counted here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.admission import OutputLengths, peak_blocks
from scheduler.block_hash import extend_chain
from scheduler.block_manager import BlockManager
from scheduler.forks import Forks
from scheduler.promises import Promises
from scheduler.sequence import Sequence
from scheduler.swapper import Prefix, Swapper
from scheduler.waiting_queue import WaitingQueue
from scheduler.worker_choice import SEQUENCE_COST_TOKENS, Outlook

MAX_PASSED_OVER = 64
"""Waiting sequences looked at behind ones that wait for a prefix another sequence is computing."""


@dataclass(frozen=True, slots=True)
class PlannerLimits:
    """What one worker can run, and how full its pool may get."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    overcommit: float
    """Share of the pool that the expected peak may reach; over 1 accepts preemptions."""


class Fit(NamedTuple):
    """A sequence that fits: where its prefix is found, and how many fresh blocks it needs behind that."""

    sequence: Sequence
    found: Prefix
    num_new: int


class Admitter:
    """Owns the waiting queue and what is known of prefixes being computed. Decides; the planner carries out."""

    def __init__(self, limits: PlannerLimits, blocks: BlockManager, swapper: Swapper, forks: Forks) -> None:
        self.waiting = WaitingQueue()
        self.lengths = OutputLengths()
        self._limits = limits
        self._blocks = blocks
        self._swapper = swapper
        self._forks = forks
        self._computing: dict[bytes, Sequence] = {}  # hashes of full prompt blocks that a running sequence will fill
        self._promises = Promises()
        self._num_free_at_refusal: int | None = None

    def note_change(self) -> None:
        """Who was refused may fit now, though as many blocks are free as before."""
        self._num_free_at_refusal = None

    # -- who waits ----------------------------------------------------------------------------------------------------

    def expect(self, sequence: Sequence) -> None:
        """It is on its way here, or waits already: whoever comes from now on counts on what it will compute."""
        num_known = self._num_known_blocks(sequence.block_hashes)
        self._promises.make(sequence, len(sequence.token_ids) - num_known * self._limits.block_size)

    def expect_no_more(self, sequence: Sequence) -> None:
        """It does not come after all; one that waits here stays."""
        if sequence not in self.waiting:
            self._promises.drop(sequence)

    def queue(self, sequence: Sequence) -> None:
        """It waits from now on."""
        extend_chain(sequence.root_hash, sequence.block_hashes, sequence.token_ids, self._limits.block_size)
        self.expect(sequence)
        self.waiting.push(sequence)
        self.note_change()  # it may come before what was refused

    def unqueue(self, sequence: Sequence) -> None:
        """It waits no longer."""
        self.waiting.remove(sequence)
        self._promises.drop(sequence)
        self.note_change()  # it may be what was refused

    def outlook(self, hashes: list[bytes], running: list[Sequence]) -> Outlook:
        """What a sequence with this chain would find here."""
        num_sequences = len(running) + self._forks.num_waiting + len(self._promises)
        num_queued_tokens = sum([s.num_unplanned_tokens for s in running]) + self._promises.num_tokens
        return Outlook(
            num_queued_tokens + SEQUENCE_COST_TOKENS * num_sequences,
            len(self._swapper.find_prefix(hashes)) * self._limits.block_size,
            self._num_known_blocks(hashes) * self._limits.block_size,
        )

    def _num_known_blocks(self, hashes: list[bytes]) -> int:
        """From the front, those that a pool has, or will have: being computed, or promised."""
        is_known, computing, promises = self._swapper.is_known, self._computing, self._promises
        for num_known, hash_ in enumerate(hashes):
            if not (is_known(hash_) or hash_ in computing or hash_ in promises):
                return num_known
        return len(hashes)

    # -- prefixes -----------------------------------------------------------------------------------------------------

    def claim_prefix(self, sequence: Sequence) -> None:
        """What this sequence will compute of its prompt, nobody else needs to."""
        for hash_ in sequence.block_hashes[sequence.num_published_blocks :]:
            self._computing.setdefault(hash_, sequence)

    def drop_claims(self, sequence: Sequence) -> None:
        """It computes nothing any more."""
        for hash_ in sequence.block_hashes:
            self.drop_claim(sequence, hash_)
        self.note_change()

    def drop_claim(self, sequence: Sequence, hash_: bytes) -> None:
        """It has computed this block."""
        if self._computing.get(hash_) is sequence:
            del self._computing[hash_]
            self.note_change()

    def usable_hashes(self, sequence: Sequence) -> list[bytes]:
        """Of a prompt's full blocks those that may be hits: its last token is always run, for its logits."""
        return sequence.block_hashes[: (len(sequence.token_ids) - 1) // self._limits.block_size]

    # -- who fits ------------------------------------------------------------------------------------------------------

    def fitting(self, running: list[Sequence], lookahead: int) -> Iterator[Fit]:
        """Those that fit, in their order. The caller admits each, as one of `running`, before it asks for the next."""
        if not self.waiting or len(running) >= self._limits.max_num_seqs:
            return
        num_pending = sum(s.num_unplanned_tokens for s in running)
        num_passed_over = 0
        for sequence in self.waiting:
            if (
                num_pending >= self._limits.max_num_batched_tokens
                or len(running) >= self._limits.max_num_seqs
                or num_passed_over >= MAX_PASSED_OVER
                or self._num_free_at_refusal == self._blocks.num_available_blocks
            ):
                break
            if sequence.num_plans_in_flight or sequence.awaits_choice or self._awaits_prefix(sequence):
                num_passed_over += 1
                continue
            fit = self._fit(sequence, running, lookahead)
            if fit is None:
                self._num_free_at_refusal = self._blocks.num_available_blocks
                break
            yield fit
            num_pending += sequence.num_unplanned_tokens

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Whether the next block of this one's prefix is being computed, or on its way in, for another one."""
        extend_chain(sequence.root_hash, sequence.block_hashes, sequence.token_ids, self._limits.block_size)
        usable = self.usable_hashes(sequence)
        num_found = len(self._swapper.find_prefix(usable, sequence.attempt > 0))
        if num_found == len(usable):
            return False
        return usable[num_found] in self._computing or self._swapper.is_arriving(usable[num_found])

    def _fit(self, sequence: Sequence, running: list[Sequence], lookahead: int) -> Fit | None:
        """None where it finds no room now, or the batch none at its peak. Notes in it what it would share."""
        block_size, blocks = self._limits.block_size, self._blocks
        found = self._swapper.find_prefix(self.usable_hashes(sequence), sequence.attempt > 0)
        shared = found.shared
        num_tokens = min(len(sequence.token_ids) + 1 + lookahead, sequence.max_num_tokens)
        num_blocks = -(-max(num_tokens, len(sequence.token_ids)) // block_size)
        num_cached = blocks.num_cached_among(shared)
        if num_blocks - len(shared) > blocks.num_available_blocks - num_cached:
            return None
        sequence.num_shared_blocks = len(shared)
        if running:
            num_private = sum(len(s.block_ids) - s.num_shared_blocks for s in running)
            num_shared = blocks.num_referenced_blocks - num_private + num_cached
            followers = [f for s in (*running, sequence) for f in self._forks.followers_of(s)]
            peak = num_shared + peak_blocks([*running, sequence, *followers], self.lengths, block_size)
            if peak > self._limits.overcommit * blocks.num_blocks:
                sequence.num_shared_blocks = 0
                return None
        return Fit(sequence, found, num_blocks - len(found))
