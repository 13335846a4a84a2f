"""The mirror of one worker's host blocks: the lower tier of its prefix cache. Pure.

A host block is exactly one of free (no hash), held (a swap under way reads or writes it) and cached (a block's content,
found by its hash). Cached ones are evicted as on the device, but for pinned hashes: those of preempted sequences, which
come back for them. Pins are the scheduler's own, like the order of eviction: Redis knows nothing of them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scheduler.block_states import BlockState, BlockStates


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


class HostPool(BlockStates):
    """Owns the references of swaps, and the pins."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._pins: Counter[bytes] = Counter()

    @classmethod
    def from_image(cls, image: HostImage) -> "HostPool":
        """The mirror that Redis tells of: nothing pinned."""
        pool = cls(image.num_blocks)
        pool._restore(image.ref_counts, image.hashes)
        return pool

    def image(self, swap_outs: Mapping[int, int], swap_ins: Mapping[int, int]) -> HostImage:
        """The state that a mirror rebuilt from Redis must equal."""
        return HostImage(*self._stored(), dict(swap_outs), dict(swap_ins))

    @property
    def num_cached_blocks(self) -> int:
        """Host blocks with a content, whether it may be evicted or is pinned or being read."""
        return len(self._index)

    def take(self) -> int:
        """A host block to be written, held from now on; the caller has seen that one is available."""
        return self._take_one()[0]

    def fill(self, block_id: int, hash_: bytes) -> None:
        """What was taken has been written."""
        self._enter(block_id, hash_)
        self.let_go(block_id)

    def hold(self, block_id: int) -> None:
        """A swap reads a cached host block."""
        if not self._ref_counts[block_id] and not self._pins[self.hash_of(block_id)]:
            self._cached.remove(block_id)
        self._ref_counts[block_id] += 1

    def let_go(self, block_id: int) -> None:
        """The swap is done."""
        self._ref_counts[block_id] -= 1
        self._cache_unless_kept(block_id)

    def pin(self, hashes: Iterable[bytes]) -> None:
        """These are not evicted, whether they are here or come, until they are unpinned as often."""
        for hash_ in hashes:
            block_id = self.block_of(hash_)
            if block_id and not self._ref_counts[block_id] and not self._pins[hash_]:
                self._cached.remove(block_id)
            self._pins[hash_] += 1

    def unpin(self, hashes: Iterable[bytes]) -> None:
        """Undoes a pin."""
        for hash_ in hashes:
            self._pins[hash_] -= 1
            if self._pins[hash_] == 0:
                del self._pins[hash_]
                if block_id := self.block_of(hash_):
                    self._cache_unless_kept(block_id)

    def check(self, held: Iterable[int]) -> None:
        """Asserts rule 1 of the design against the swaps that there are; for tests and idle moments."""
        counts = [0] * (self.num_blocks + 1)
        for block_id in held:
            counts[block_id] += 1
        assert all(count > 0 for count in self._pins.values())
        pinned = (self.block_of(hash_) for hash_ in self._pins)
        self._check(counts, frozenset(block_id for block_id in pinned if block_id and not counts[block_id]))

    def _state(self, block_id: int) -> BlockState:
        state = super()._state(block_id)
        is_cached = state in (BlockState.CACHED, BlockState.PROTECTED)
        return BlockState.SET_ASIDE if is_cached and self._pins[self.hash_of(block_id)] else state

    def _cache_unless_kept(self, block_id: int) -> None:
        hash_ = self.hash_of(block_id)
        if not self._ref_counts[block_id] and not self._pins[hash_]:
            self._cached.add(block_id, hash_)
