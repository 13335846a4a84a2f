"""The mirror of one worker's host blocks: the lower tier of its prefix cache. Pure.

A host block is exactly one of free (no hash), held (a swap under way reads or writes it) and cached (a block's content,
found by its hash). Cached ones are evicted as on the device, but for pinned hashes: those of preempted sequences, which
come back for them. Pins are the scheduler's own, like the order of eviction: Redis knows nothing of them.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scheduler.block_manager import BlockState
from scheduler.eviction import EvictionQueue


@dataclass(frozen=True, slots=True)
class HostImage:
    """A host pool's state as Redis holds it, and the swaps that are under way."""

    num_blocks: int = 0
    ref_counts: Mapping[int, int] = field(default_factory=dict)
    hashes: Mapping[int, bytes] = field(default_factory=dict)
    swap_outs: Mapping[int, int] = field(default_factory=dict)
    """Host block -> the block that is copied into it."""
    swap_ins: Mapping[int, int] = field(default_factory=dict)
    """Block -> the host block that is copied into it."""


class HostPool:
    """Owns the state of host blocks 1 to num_blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._hashes: list[bytes | None] = [None] * (num_blocks + 1)
        self._index: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(1, num_blocks + 1))
        self._cached = EvictionQueue(num_blocks)
        self._pins: Counter[bytes] = Counter()

    @classmethod
    def from_image(cls, image: HostImage) -> "HostPool":
        """The mirror that Redis tells of: nothing pinned, the order of eviction by block_id."""
        pool = cls(image.num_blocks)
        for block_id, ref_count in image.ref_counts.items():
            pool._ref_counts[block_id] = ref_count
        for block_id, hash_ in image.hashes.items():
            pool._hashes[block_id] = hash_
            pool._index[hash_] = block_id
        pool._free = deque(i for i in pool._free if not pool._ref_counts[i] and pool._hashes[i] is None)
        for block_id, hash_ in sorted(image.hashes.items()):
            pool._cache_unless_held(block_id, hash_)
        return pool

    def image(self, swap_outs: Mapping[int, int], swap_ins: Mapping[int, int]) -> HostImage:
        """The state that a mirror rebuilt from Redis must equal."""
        return HostImage(
            self.num_blocks,
            {i: count for i, count in enumerate(self._ref_counts) if count},
            {i: hash_ for i, hash_ in enumerate(self._hashes) if hash_ is not None},
            dict(swap_outs),
            dict(swap_ins),
        )

    @property
    def num_free_blocks(self) -> int:
        """Host blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Host blocks with a content, whether it may be evicted or is pinned or being read."""
        return len(self._index)

    @property
    def num_available_blocks(self) -> int:
        """Host blocks that can be taken now."""
        return len(self._free) + len(self._cached)

    def states(self, first: int, last: int) -> bytes:
        """A BlockState for each of the host blocks from `first` to `last`."""
        return bytes(self._state(block_id) for block_id in range(first, last + 1))

    def _state(self, block_id: int) -> BlockState:
        hash_ = self._hashes[block_id]
        if self._ref_counts[block_id]:
            return BlockState.REFERENCED
        if hash_ is None:
            return BlockState.FREE
        if self._pins[hash_]:
            return BlockState.SET_ASIDE
        return BlockState.PROTECTED if self._cached.is_protected(block_id) else BlockState.CACHED

    def block_of(self, hash_: bytes) -> int:
        """The host block that holds this content; 0: none."""
        return self._index.get(hash_, 0)

    def hash_of(self, block_id: int) -> bytes:
        """Of a cached host block."""
        hash_ = self._hashes[block_id]
        assert hash_ is not None, f"host block {block_id} holds nothing"
        return hash_

    def touch(self, hashes: Iterable[bytes]) -> None:
        """A request asks for this chain: see `BlockManager.touch`."""
        for hash_ in hashes:
            block_id = self._index.get(hash_)
            if block_id is None:
                self._cached.touch_evicted(hash_)
            else:
                self._cached.touch(block_id)

    def take(self) -> int:
        """A host block to be written, held from now on; the caller has seen that one is available."""
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, hash_ = self._cached.evict()
            del self._index[hash_]
            self._hashes[block_id] = None
        self._ref_counts[block_id] = 1
        return block_id

    def fill(self, block_id: int, hash_: bytes) -> None:
        """What was taken has been written."""
        assert hash_ not in self._index, "one content in two host blocks"
        self._hashes[block_id] = hash_
        self._index[hash_] = block_id
        self._cached.publish(block_id, hash_)
        self.let_go(block_id)

    def hold(self, block_id: int) -> None:
        """A swap reads a cached host block."""
        if not self._ref_counts[block_id] and not self._pins[self.hash_of(block_id)]:
            self._cached.remove(block_id)
        self._ref_counts[block_id] += 1

    def let_go(self, block_id: int) -> None:
        """The swap is done."""
        self._ref_counts[block_id] -= 1
        self._cache_unless_held(block_id, self.hash_of(block_id))

    def pin(self, hashes: Iterable[bytes]) -> None:
        """These are not evicted, whether they are here or come, until they are unpinned as often."""
        for hash_ in hashes:
            block_id = self._index.get(hash_)
            if block_id is not None and not self._ref_counts[block_id] and not self._pins[hash_]:
                self._cached.remove(block_id)
            self._pins[hash_] += 1

    def unpin(self, hashes: Iterable[bytes]) -> None:
        """Undoes a pin."""
        for hash_ in hashes:
            self._pins[hash_] -= 1
            if self._pins[hash_] == 0:
                del self._pins[hash_]
                block_id = self._index.get(hash_)
                if block_id is not None:
                    self._cache_unless_held(block_id, hash_)

    def check(self, held: Iterable[int]) -> None:
        """Asserts rule 1 of the design against the swaps that there are; for tests and idle moments."""
        counts = [0] * (self.num_blocks + 1)
        for block_id in held:
            counts[block_id] += 1
        assert counts == self._ref_counts, "ref_count of a host block differs from the swaps that name it"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a host block is free twice"
        for block_id in range(1, self.num_blocks + 1):
            hash_ = self._hashes[block_id]
            assert hash_ is None or self._index[hash_] == block_id, f"host block {block_id} is not what the index says"
            is_held = self._ref_counts[block_id] > 0
            is_pinned = hash_ is not None and self._pins[hash_] > 0
            assert (block_id in free) == (hash_ is None and not is_held), f"host block {block_id} is not free"
            assert (block_id in cached) == (hash_ is not None and not is_held and not is_pinned)
        assert len(self._index) == sum(hash_ is not None for hash_ in self._hashes)
        assert all(count > 0 for count in self._pins.values())

    def _cache_unless_held(self, block_id: int, hash_: bytes) -> None:
        if not self._ref_counts[block_id] and not self._pins[hash_]:
            self._cached.add(block_id, hash_)
