"""The dense baseline: a planner that gives each request one contiguous range for all that it may come to hold.

Everything but the reserving is the real planner: the order of sequences, the token budget, chunked prompts. A range
begins and ends at borders of blocks, and goes to the worker as a table of consecutive blocks: the same batch and the
same kernels run it, over contiguous memory, with no work for slots that are empty. That is as fast as dense can be.
"""

from collections.abc import Callable, Mapping

from scheduler.admitter import PlannerLimits
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner
from scheduler.sequence import Sequence, SequenceStatus
from tests.load.memory.accounting import MemoryUse, Reservation, dense_use
from tests.load.memory.ranges import RangeAllocator

Reserve = Callable[[Sequence], int]
"""How many slots a sequence is given at its admission."""


def reserve_longest(max_model_len: int) -> Reserve:
    """For the longest sequence that there can be: what is left where nobody knows how long an output will be."""
    return lambda sequence: max_model_len


def reserve_power_of_two(max_model_len: int) -> Reserve:
    """For prompt and output, the output rounded up to a power of two; it is known, then, to within a factor of two.

    As "Orca (Pow2)" of Kwon et al. (SOSP 2023).
    """

    def reserve(sequence: Sequence) -> int:
        rounded = 1 << (sequence.limits.max_output_tokens - 1).bit_length()
        return min(sequence.num_prompt_tokens + rounded, max_model_len)

    return reserve


class DensePlanner(Planner):
    """First come, first served: who finds no hole waits, and all behind it."""

    def __init__(self, limits: PlannerLimits, ranges: RangeAllocator, reserve: Reserve) -> None:
        """ranges: slot i is slot i of the pool's usable blocks, which begin behind the null block."""
        super().__init__(limits, BlockManager(0, Changes()))
        self.ranges = ranges
        self._reserve = reserve
        self._num_slots_wanted = 0  # of the first that waits, since it was refused
        self._held: dict[int, tuple[int, int]] = {}  # seq_id -> (first slot, slots)

    def grow_and_admit(self, lookahead: int) -> None:
        """Nothing grows. Admits until one finds no hole."""
        while self.waiting and not self._num_slots_wanted and len(self.running) < self.limits.max_num_seqs:
            sequence = next(iter(self.waiting))
            block_size = self.limits.block_size
            num_slots = -(-self._reserve(sequence) // block_size) * block_size
            start = self.ranges.allocate(num_slots)
            if start is None:
                self._num_slots_wanted = num_slots
                return
            self.waiting.remove(sequence)
            self._held[sequence.seq_id] = (start, num_slots)
            sequence.block_ids = list(range(start // block_size + 1, (start + num_slots) // block_size + 1))
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            self.reserved.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """As the planner's; the range is a hole again."""
        if sequence.seq_id in self._held:
            self.ranges.release(*self._held.pop(sequence.seq_id))
            sequence.block_ids = []
            self._num_slots_wanted = 0
        super().finish(sequence)

    def publish_computed(self, sequence: Sequence) -> None:
        """A range is never shared."""

    def use(self, num_run: Mapping[int, int]) -> MemoryUse:
        """What the memory does during a step that runs so many tokens of each sequence."""
        held = [
            Reservation(
                num_slots=self._held[sequence.seq_id][1],
                num_tokens=sequence.num_computed_tokens + num_run.get(sequence.seq_id, 0),
                max_num_tokens=sequence.max_num_tokens,
            )
            for sequence in self.running
        ]
        return dense_use(self.ranges, held, self._num_slots_wanted)
