"""What a pool remembers for `pagoda explain`: who evicted what, and where admitted prompts' blocks came from. Pure.

Bounded: the last evictions by hash, and of each sequence the first admission and the last ones.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq

from scheduler.sequence import Admission, BlockSource, EvictedRun, Sequence

MAX_EVICTIONS = 10_000
"""Evictions remembered of each pool."""
MAX_ADMISSIONS = 4
"""Admissions kept of a sequence: the first, and the last of those after preemptions and lost workers."""
MAX_RUNS = 64
"""Runs of evicted blocks kept of an admission, from the front of the prompt."""


class PoolHistory:
    """Of one worker's pool, for as long as its planner lives."""

    def __init__(self, block_size: int) -> None:
        self.worker = ""
        self.now_s = 0.0
        """Unix time, told by the owner before each decision: nothing here reads a clock."""
        self.num_evictions = 0
        self._block_size = block_size
        self._evictions: OrderedDict[bytes, tuple[float, str]] = OrderedDict()  # hash -> (when, for which request)

    def note_evictions(self, hashes: list[bytes], request_id: str) -> None:
        """These made room for a request; empties the list."""
        for hash_ in hashes:
            self._evictions[hash_] = (self.now_s, request_id)
            self._evictions.move_to_end(hash_)
            if len(self._evictions) > MAX_EVICTIONS:
                self._evictions.popitem(last=False)
        self.num_evictions += len(hashes)
        hashes.clear()

    def note_admission(self, sequence: Sequence, found: Seq[int]) -> None:
        """A sequence gets blocks, the first of them `found`, or (0) on the host; before what it evicts is noted."""
        num_blocks = -(-sequence.num_prompt_tokens // self._block_size)
        num_usable = (len(sequence.token_ids) - 1) // self._block_size
        hits = found[:num_blocks]  # of a preempted sequence its output may be hits too
        sources = bytearray(BlockSource.HIT if block_id else BlockSource.HOST_HIT for block_id in hits)
        evicted: list[EvictedRun] = []
        for i in range(len(hits), num_blocks):
            eviction = self._evictions.get(sequence.block_hashes[i]) if i < num_usable else None
            if i >= num_usable:
                sources.append(BlockSource.LAST)
            elif eviction is None:
                sources.append(BlockSource.COMPUTED)
            else:
                sources.append(BlockSource.EVICTED)
                _extend_runs(evicted, i, eviction)
        admission = Admission(self.worker, self.now_s, sequence.attempt, bytes(sources), tuple(evicted[:MAX_RUNS]))
        if len(sequence.admissions) == MAX_ADMISSIONS:
            del sequence.admissions[1]
        sequence.admissions.append(admission)


def _extend_runs(runs: list[EvictedRun], block: int, eviction: tuple[float, str]) -> None:
    """Blocks side by side that went at once for the same request are one run."""
    if runs and runs[-1].first_block + runs[-1].num_blocks == block and runs[-1].eviction == eviction:
        runs[-1] = EvictedRun(runs[-1].first_block, runs[-1].num_blocks + 1, eviction)
    else:
        runs.append(EvictedRun(block, 1, eviction))
