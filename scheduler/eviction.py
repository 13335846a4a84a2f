"""Which cached block goes when a block is needed: segmented LRU with a memory of what it evicted. Pure.

Segmented LRU (Karedla, Love and Wherry, "Caching Strategies to Improve Disk System Performance", 1994): blocks that one
request has asked for wait on probation, those that a second one asked for are protected, each segment least recently
used first. Victims come from probation, so that a stream of one-off prompts evicts its own blocks and no others. While
the protected segment has more than its share, its oldest block goes back to the young end of probation.

A block evicted too early is known by its hash for as many evictions as the pool has blocks (the list of the "2Q" of
Johnson and Shasha, 1994). Where a request asks for it in that time it is protected as soon as it is there again: so a
new set of hot prompts gets in beside an old one whose share is never used up, and so does the old one after a restart.

Chosen over 2Q proper and S3-FIFO, whose main queue may lose a chain's head while its tail still waits in the small one:
here a block that leaves protection stands behind everything on probation, and whoever asks for a block asks for all
before it, so that a head is evicted after the tails that need it. LRU-2 needs a heap, not O(1). Order and protection
are the scheduler's own: a mirror rebuilt from Redis begins with everything on probation.
"""

from collections import OrderedDict
from collections.abc import Iterator

PROTECTED_PER_PROBATION = 4
"""Most protected blocks per block on probation: four fifths of what is cached."""


class EvictionQueue:
    """Owns the order of a pool's cached blocks, and which of all published ones are protected.

    Every operation is O(1); an OrderedDict, for a dict's first key is found by walking over all that were deleted.
    """

    def __init__(self, num_remembered: int) -> None:
        """`num_remembered`: evicted blocks to know again."""
        self._probation: OrderedDict[int, bytes] = OrderedDict()
        self._protected: OrderedDict[int, bytes] = OrderedDict()
        self._asked_again: set[int] = set()
        self._held: set[int] = set()  # in their place in the order, and not to be evicted now
        self._evicted: OrderedDict[bytes, bool] = OrderedDict()  # hash -> whether it was asked for since
        self._num_remembered = num_remembered

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected) - len(self._held)

    def __contains__(self, block_id: int) -> bool:
        return (block_id in self._probation or block_id in self._protected) and block_id not in self._held

    def __iter__(self) -> Iterator[int]:
        """What may be evicted now, in about the order in which it would be."""
        for segment in (self._probation, self._protected):
            yield from (block_id for block_id in segment if block_id not in self._held)

    def is_protected(self, block_id: int) -> bool:
        """Whether a block is cached and goes after those on probation."""
        return block_id in self._protected

    def touch(self, block_id: int) -> None:
        """A request asks for a published block that another one filled: protected when it is cached the next time."""
        self._asked_again.add(block_id)

    def touch_evicted(self, hash_: bytes) -> None:
        """A request asks for what is not published: it counts where it was evicted lately."""
        if hash_ in self._evicted:
            self._evicted[hash_] = True

    def publish(self, block_id: int, hash_: bytes) -> None:
        """A block holds this content from now on."""
        if self._evicted.pop(hash_, False):
            self._asked_again.add(block_id)

    def add(self, block_id: int, hash_: bytes) -> None:
        """The last table has let a published block go: the youngest of its segment."""
        segment = self._protected if block_id in self._asked_again else self._probation
        segment[block_id] = hash_

    def remove(self, block_id: int) -> bytes:
        """A table names a cached block again; its hash."""
        segment = self._protected if block_id in self._protected else self._probation
        self._held.discard(block_id)
        return segment.pop(block_id)

    def hold(self, block_id: int) -> None:
        """A cached block is not to be evicted until `let_go`; its place stays."""
        self._held.add(block_id)

    def is_held(self, block_id: int) -> bool:
        """Whether a cached block is held."""
        return block_id in self._held

    def let_go(self, block_id: int) -> bool:
        """A block that was held may be evicted again; False where it was not."""
        if block_id not in self._held:
            return False
        self._held.remove(block_id)
        return True

    def evict(self) -> tuple[int, bytes]:
        """Takes the least valuable block out, and its hash."""
        if len(self._protected) > PROTECTED_PER_PROBATION * len(self._probation):
            block_id, hash_ = self._protected.popitem(last=False)
            self._asked_again.remove(block_id)
            self._probation[block_id] = hash_
        block_id = next(iter(self))
        hash_ = self.remove(block_id)
        self._asked_again.discard(block_id)
        self._evicted[hash_] = False
        if len(self._evicted) > self._num_remembered:
            self._evicted.popitem(last=False)
        return block_id, hash_
