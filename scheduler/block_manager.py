"""The mirror of one worker's blocks: which are free, referenced, cached, and what each holds.

Pure: decides in memory and writes every decision into `changes`, the rows of the next script; Redis makes it true.
Block 0 is the null block and never handed out.

A block is exactly one of free (ref_count 0, no hash), referenced (ref_count > 0: by tables, by copies and swaps under
way) and cached (ref_count 0, published hash). Which cached block is evicted is the eviction queue's to say; of one
table it is always the tail before its head, so that a chain never loses a block that a longer one still needs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

from scheduler.block_states import BlockStates
from scheduler.changes import Changes


class BlockCopy(NamedTuple):
    """The first tokens of one block into another."""

    source: int
    destination: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PoolImage:
    """A pool's state as Redis holds it, the null block left out."""

    num_blocks: int
    ref_counts: dict[int, int]
    hashes: dict[int, bytes]
    copies: dict[int, tuple[int, int]]
    """Copy destination -> (source, tokens): copies whose result is not committed."""


class BlockManager(BlockStates):
    """Owns tables' references and copies. Raises nothing in normal use: callers ask for what is there."""

    def __init__(self, num_blocks: int, changes: Changes) -> None:
        super().__init__(num_blocks)
        self.changes = changes
        self.freed_block_ids: list[int] = []
        """Blocks that became free since the caller last emptied this list."""
        self.evicted_hashes: list[bytes] = []
        """What was evicted since the caller last emptied this list."""
        self._copies: dict[int, tuple[int, int]] = {}

    @classmethod
    def from_image(cls, image: PoolImage, changes: Changes) -> "BlockManager":
        """The mirror that Redis tells of."""
        manager = cls(image.num_blocks, changes)
        manager._restore(image.ref_counts, image.hashes)
        manager._copies = dict(image.copies)
        return manager

    def image(self) -> PoolImage:
        """The state that a mirror rebuilt from Redis must equal."""
        return PoolImage(*self._stored(), dict(self._copies))

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that only the prefix index names."""
        return len(self._cached)

    @property
    def num_referenced_blocks(self) -> int:
        """Blocks that a table or a running copy names."""
        return self.num_blocks - self.num_available_blocks

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """How many of these are cached, and so would no longer be available once shared."""
        return sum(block_id in self._cached for block_id in block_ids)

    def reserve(self, seq_id: int, found: Sequence[int], num_new: int) -> list[int]:
        """Appends to a table: `found`, published blocks to share or 0 for a fresh one in between, then `num_new` fresh
        ones; returns all their ids.

        The caller has made sure that there are enough beside those of `found` that are cached.
        """
        for block_id in found:
            if block_id:
                self._add_reference(block_id)
        block_ids: list[int] = []
        rows: list[tuple[list[tuple[int, bytes]], list[int]]] = [([], [])]  # shared blocks, then fresh ones
        for found_id in chain(found, repeat(0, num_new)):
            block_ids.append(found_id or self._take())
            if not found_id:
                rows[-1][1].append(block_ids[-1])
                continue
            if rows[-1][1]:
                rows.append(([], []))
            rows[-1][0].append((found_id, self.hash_of(found_id)))
        self.changes.reserve += [(seq_id, shared, new) for shared, new in rows]
        return block_ids

    def publish(self, block_id: int, hash_: bytes) -> bool:
        """Enters a filled block into the index; False where another block already holds this content."""
        if hash_ in self._index:
            return False
        assert self._ref_counts[block_id] > 0, f"block {block_id} published without a reference"
        assert self._hashes[block_id] is None, f"block {block_id} published twice"
        self._enter(block_id, hash_)
        self.changes.publish.append((block_id, hash_))
        return True

    def fork(self, parent_id: int, child_id: int, table: Sequence[int], tail: tuple[int, int] | None) -> list[int]:
        """The child's table: `table`'s blocks shared, and, where `tail` = (source block, tokens), a copy of it.

        The copy holds its source and its destination until `finish_copies` names the latter: were the child's block
        reused before, a new owner that issues the copy again would overwrite it. Not for a tail whose own copy runs.
        """
        for block_id in table:
            self._add_reference(block_id)
        if tail is None:
            self.changes.fork.append((parent_id, child_id, len(table), 0, 0, 0))
            return list(table)
        source, num_tokens = tail
        assert source not in self._copies, f"block {source} copied before its own copy has run"
        self._add_reference(source)
        copy = self._take()
        self._ref_counts[copy] += 1
        self._copies[copy] = tail
        self.changes.fork.append((parent_id, child_id, len(table), source, copy, num_tokens))
        return [*table, copy]

    def finish_copies(self, destinations: Sequence[int]) -> None:
        """These copies have run, and their result is committed with the next script: they hold nothing any more."""
        for destination in destinations:
            source, _ = self._copies.pop(destination)
            self._drop_reference(source)
            self._drop_reference(destination)
            self.changes.copied.append(destination)

    @property
    def pending_copies(self) -> dict[int, tuple[int, int]]:
        """Copy destination -> (source, tokens) of copies that are not committed; a new owner issues them again."""
        return dict(self._copies)

    def hold(self, block_id: int) -> None:
        """A swap reads a block, or writes a reserved one: not reused until `let_go`, whoever names it."""
        if not self._ref_counts[block_id]:
            self._cached.hold(block_id)
        self._ref_counts[block_id] += 1

    def let_go(self, block_id: int) -> None:
        """The swap is done. What was cached all the while keeps its place in the order of eviction."""
        self._drop_reference(block_id)

    def release(self, seq_id: int, table: Sequence[int]) -> None:
        """Gives a whole table back, its tail first."""
        for block_id in reversed(table):
            self._drop_reference(block_id)
        self.changes.release_table(seq_id)

    def check(self, tables: Iterable[Sequence[int]], held: Iterable[int] = ()) -> None:
        """Asserts rule 1 of the design against the tables and swaps that there are; for tests and idle moments."""
        counts = [0] * (self.num_blocks + 1)
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        for destination, (source, _) in self._copies.items():
            counts[source] += 1
            counts[destination] += 1
        for block_id in held:
            counts[block_id] += 1
        self._check(counts)

    def _add_reference(self, block_id: int) -> None:
        if self._ref_counts[block_id] == 0 or self._cached.is_held(block_id):
            self._cached.remove(block_id)
        self._ref_counts[block_id] += 1

    def _drop_reference(self, block_id: int) -> None:
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id]:
            return
        hash_ = self._hashes[block_id]
        if hash_ is None:
            self._free.append(block_id)
            self.freed_block_ids.append(block_id)
        elif not self._cached.let_go(block_id):
            self._cached.add(block_id, hash_)

    def _take(self) -> int:
        block_id, evicted = self._take_one()
        if evicted is not None:
            self.evicted_hashes.append(evicted)
        return block_id
