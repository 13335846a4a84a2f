"""What the slots of a KV memory are doing: the one accounting for paged and dense, in tests and in `make bench-memory`.

A slot is taken or free. A taken slot holds a token, or it is wasted: an internal one will not be filled, a reserved one
will be, later. A free slot is wasted too where it lies in a hole that is of no use to the request that waits. Blocks
reserve nothing for later: all of their empty slots count as internal, those taken ahead of need among them. A block
that sequences share counts once, a cached one is free: it goes to whoever needs it.
"""

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

from scheduler.block_manager import BlockManager
from tests.load.memory.ranges import RangeAllocator


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Slots by what they do, at a moment, or slot-seconds over a time; all but `tail` add up to the whole memory."""

    tokens: float = 0.0
    """Hold a token."""
    internal: float = 0.0
    """Taken, and empty for good; in blocks, empty at the moment."""
    reserved: float = 0.0
    """Taken for tokens that will come."""
    external: float = 0.0
    """Free, enough for the request that waits, and in holes that are each too small for it."""
    free: float = 0.0
    tail: float = 0.0
    """Of the internal ones, those behind the last token of a block: what no allocator of such blocks can save."""

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def during(self, seconds: float) -> "MemoryUse":
        """Slot-seconds of this state."""
        return MemoryUse(*(slots * seconds for slots in astuple(self)))

    @property
    def whole(self) -> float:
        """The memory."""
        return self.tokens + self.internal + self.reserved + self.external + self.free

    @property
    def wasted(self) -> float:
        """Share of what is taken, or useless, that holds no token."""
        lost = self.internal + self.reserved + self.external
        return lost / (self.tokens + lost) if lost else 0.0

    @property
    def least_wasted(self) -> float:
        """What `wasted` would be for the same tokens if nothing but the blocks' tails were empty."""
        return self.tail / (self.tokens + self.tail) if self.tail else 0.0

    def share(self, part: str) -> float:
        """A part, of what `wasted` is a share of."""
        return float(getattr(self, part)) / ((self.whole - self.free) or 1.0)


@dataclass(frozen=True, slots=True)
class Table:
    """A sequence's blocks, and how many tokens it has written into them."""

    block_ids: Collection[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A contiguous range: its slots, the tokens in it, and those that will ever be in it."""

    num_slots: int
    num_tokens: int
    max_num_tokens: int


def paged_use(blocks: BlockManager, block_size: int, tables: Iterable[Table]) -> MemoryUse:
    """Of the pool that `blocks` keeps; `tables` are all that there are."""
    filled: dict[int, int] = {}
    for table in tables:
        num_full, rest = divmod(table.num_tokens, block_size)
        for position, block_id in enumerate(table.block_ids):
            num_in_block = block_size if position < num_full else rest if position == num_full else 0
            filled[block_id] = max(filled.get(block_id, 0), num_in_block)
    num_taken = blocks.num_referenced_blocks * block_size
    num_tokens = sum(filled.values())
    return MemoryUse(
        tokens=num_tokens,
        internal=num_taken - num_tokens,
        free=blocks.num_available_blocks * block_size,
        tail=sum(block_size - num_in_block for num_in_block in filled.values() if num_in_block),
    )


def dense_use(ranges: RangeAllocator, reservations: Iterable[Reservation], num_wanted: int = 0) -> MemoryUse:
    """Of the memory that `ranges` shares out; num_wanted: slots that a request waits for, 0 where none does."""
    held = list(reservations)
    num_useful = sum(min(r.num_slots, r.max_num_tokens) for r in held)
    num_tokens = sum(r.num_tokens for r in held)
    num_free = ranges.num_free_slots
    is_scattered = ranges.largest_hole < num_wanted <= num_free
    return MemoryUse(
        tokens=num_tokens,
        internal=sum(r.num_slots for r in held) - num_useful,
        reserved=num_useful - num_tokens,
        external=num_free if is_scattered else 0,
        free=0 if is_scattered else num_free,
    )


def saved_by_sharing(tables: Iterable[Collection[int]]) -> float:
    """Share of the blocks that the tables name which nobody has to store, because another table names them too."""
    named = [block_id for table in tables for block_id in table]
    return 1 - len(set(named)) / len(named) if named else 0.0
