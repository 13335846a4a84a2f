"""Who shares out the same KV memory in `make bench-memory`: dense reservations, and the block manager."""

from collections.abc import Callable, Mapping

from scheduler.admitter import PlannerLimits
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner
from tests.load.memory.accounting import MemoryUse, Table, paged_use
from tests.load.memory.dense import DensePlanner, Reserve, reserve_longest, reserve_power_of_two
from tests.load.memory.drive import Contender
from tests.load.memory.ranges import RangeAllocator
from tests.load.memory.traces import MAX_MODEL_LEN

DENSE_LONGEST = "dense, max_model_len"
DENSE_POWER = "dense, power of two"
PAGED = "paged"
PAGED_UNKNOWING = "paged, lengths unknown"
"""Clients allow outputs up to max_model_len: the planner goes by the lengths of those that ended."""


def dense(limits: PlannerLimits, num_blocks: int, reserve: Reserve) -> Contender:
    """Contiguous ranges."""
    planner = DensePlanner(limits, RangeAllocator(num_blocks * limits.block_size), reserve)
    return Contender(planner, planner.use)


def paged(limits: PlannerLimits, num_blocks: int) -> Contender:
    """Blocks on demand."""
    blocks = BlockManager(num_blocks, Changes())
    planner = Planner(limits, blocks)

    def use(num_run: Mapping[int, int]) -> MemoryUse:
        tables = (Table(s.block_ids, s.num_computed_tokens + num_run.get(s.seq_id, 0)) for s in planner.running)
        return paged_use(blocks, limits.block_size, tables)

    return Contender(planner, use)


CONTENDERS: dict[str, Callable[[PlannerLimits, int], Contender]] = {
    DENSE_LONGEST: lambda limits, num_blocks: dense(limits, num_blocks, reserve_longest(MAX_MODEL_LEN)),
    DENSE_POWER: lambda limits, num_blocks: dense(limits, num_blocks, reserve_power_of_two(MAX_MODEL_LEN)),
    PAGED: paged,
    PAGED_UNKNOWING: paged,
}
