"""What every block of a pool is: free, referenced or cached, and by which hash it is found. Pure.

The part that a worker's pool and its host pool have in common: rule 1 of the design. Block 0 is never handed out.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum

from scheduler.eviction import EvictionQueue


class BlockState(IntEnum):
    """What a block is; values as in the contract."""

    FREE = 1
    REFERENCED = 2
    CACHED = 3
    PROTECTED = 4
    """Cached, and evicted after those that are no more than that."""
    SET_ASIDE = 5
    """Of the host pool: cached, and kept for a preempted sequence."""


class BlockStates:
    """Owns the ref_count, the hash and the place of blocks 1 to num_blocks; whoever changes them is a subclass."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._hashes: list[bytes | None] = [None] * (num_blocks + 1)
        self._index: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(1, num_blocks + 1))
        self._cached = EvictionQueue(num_blocks)

    def _restore(self, ref_counts: Mapping[int, int], hashes: Mapping[int, bytes]) -> None:
        """What Redis tells of; the order of eviction is lost and starts by block_id, nothing protected."""
        for block_id, ref_count in ref_counts.items():
            self._ref_counts[block_id] = ref_count
        for block_id, hash_ in sorted(hashes.items()):
            self._hashes[block_id] = hash_
            self._index[hash_] = block_id
            if not self._ref_counts[block_id]:
                self._cached.add(block_id, hash_)
        self._free = deque(i for i in self._free if not self._ref_counts[i] and self._hashes[i] is None)

    def _stored(self) -> tuple[int, dict[int, int], dict[int, bytes]]:
        """What Redis holds of it: how many blocks, ref_counts and hashes that there are."""
        ref_counts = {i: count for i, count in enumerate(self._ref_counts) if count}
        return self.num_blocks, ref_counts, {i: hash_ for i, hash_ in enumerate(self._hashes) if hash_ is not None}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can be taken now: free ones, and cached ones by evicting them."""
        return len(self._free) + len(self._cached)

    def ref_count(self, block_id: int) -> int:
        """Of one block."""
        return self._ref_counts[block_id]

    def ref_counts(self, first: int, last: int) -> list[int]:
        """Of the blocks from `first` to `last`."""
        return self._ref_counts[first : last + 1]

    def states(self, first: int, last: int) -> bytes:
        """A BlockState for each of the blocks from `first` to `last`."""
        return bytes(map(self._state, range(first, last + 1)))

    def _state(self, block_id: int) -> BlockState:
        if self._ref_counts[block_id]:
            return BlockState.REFERENCED
        if self._hashes[block_id] is None:
            return BlockState.FREE
        return BlockState.PROTECTED if self._cached.is_protected(block_id) else BlockState.CACHED

    def block_of(self, hash_: bytes) -> int:
        """The block that is found by this hash; 0: none."""
        return self._index.get(hash_, 0)

    def find_hash(self, block_id: int) -> bytes | None:
        """By which a block is found, if it is."""
        return self._hashes[block_id]

    def hash_of(self, block_id: int) -> bytes:
        """By which a block is found."""
        hash_ = self._hashes[block_id]
        assert hash_ is not None, f"block {block_id} has no hash"
        return hash_

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest prefix of the chain `hashes` that is here, in order."""
        found: list[int] = []
        for hash_ in hashes:
            block_id = self._index.get(hash_)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def coldest_first(self) -> Iterator[int]:
        """What is cached, in about the order in which it would be evicted."""
        return iter(self._cached)

    def touch(self, hashes: Iterable[bytes]) -> None:
        """A request asks for this chain, once in its life: what another one has filled of it is kept longer."""
        for hash_ in hashes:
            block_id = self._index.get(hash_)
            if block_id is None:
                self._cached.touch_evicted(hash_)
            else:
                self._cached.touch(block_id)

    def _enter(self, block_id: int, hash_: bytes) -> None:
        """A referenced block is found by this hash from now on."""
        assert hash_ not in self._index, "one content in two blocks of a pool"
        self._index[hash_] = block_id
        self._hashes[block_id] = hash_
        self._cached.publish(block_id, hash_)

    def _take_one(self) -> tuple[int, bytes | None]:
        """A block, with one reference, and the hash by which it was found until now."""
        evicted = None
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, evicted = self._cached.evict()
            del self._index[evicted]
            self._hashes[block_id] = None
        self._ref_counts[block_id] = 1
        return block_id, evicted

    def _check(self, counts: list[int], is_kept: frozenset[int] = frozenset()) -> None:
        """Asserts rule 1, `counts` being the references that there are by block; `is_kept`: cached, not evictable."""
        assert counts == self._ref_counts, "ref_count differs from what names the block"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id in range(1, self.num_blocks + 1):
            hash_ = self._hashes[block_id]
            states = (block_id in free, self._ref_counts[block_id] > 0, block_id in cached or block_id in is_kept)
            assert sum(states) == 1, f"block {block_id} is in states {states}"
            assert hash_ is None or self._index[hash_] == block_id, f"block {block_id} is not what the index says"
            assert not states[0] or hash_ is None, f"free block {block_id} has a hash"
            assert not states[2] or hash_ is not None, f"cached block {block_id} has no hash"
        assert len(self._index) == sum(hash_ is not None for hash_ in self._hashes)
