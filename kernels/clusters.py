"""Which items of a work list read the same KV blocks (a shared prefix): done together, those blocks are read once.

Owns the comparison of block tables. An item is computed in the same way, bit by bit, in a cluster or alone.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kernels.work_list import WorkList


@dataclass(frozen=True, slots=True)
class Clusters:
    """In the order in which they are begun: costly ones first, so that all threads end together.

    order: [num_items] int32, all items, those of a cluster one after the other.
    starts: [num_clusters + 1] int32, into `order`.
    """

    order: NDArray[np.int32]
    starts: NDArray[np.int32]


def make_clusters(
    items: WorkList, is_sharing: NDArray[np.bool_], block_tables: NDArray[np.int32], block_size: int, max_items: int
) -> Clusters:
    """Clusters of items with the same blocks and the same KV tokens, `max_items` in each at most.

    is_sharing: [num_items], whether an item may be in a cluster with others. block_tables: [num_seqs, max_blocks].
    """
    costs = items.costs
    sharing = np.flatnonzero(is_sharing)
    first_blocks = _first_blocks(items, block_tables, block_size)[sharing]
    if len(set(first_blocks.tolist())) == len(sharing):  # mostly
        return Clusters(_int32(np.argsort(-costs, kind="stable")), np.arange(len(costs) + 1, dtype=np.int32))

    alike = np.arange(len(costs))  # of each item, the first that reads the same
    alike[sharing] = sharing[_first_alike(items, sharing, block_tables, block_size)]
    order = np.argsort(alike, kind="stable")
    places = np.arange(len(order))
    is_first = np.diff(alike[order], prepend=-1) != 0
    rank = places - np.maximum.accumulate(np.where(is_first, places, 0))
    starts = np.flatnonzero(rank % max_items == 0)  # large clusters are cut
    sizes = np.diff(starts, append=len(order))
    by_cost = np.argsort(-np.add.reduceat(costs[order], starts), kind="stable")
    ends = np.cumsum(sizes[by_cost])
    moved = np.repeat(starts[by_cost] - ends + sizes[by_cost], sizes[by_cost]) + places
    return Clusters(_int32(order[moved]), _int32(np.concatenate([[0], ends])))


class ClusterKeeper:
    """The clusters of one step after the other: found anew only where those that were found last would not serve."""

    def __init__(self, block_size: int, max_items: int) -> None:
        self._block_size = block_size
        self._max_items = max_items
        self._kept: _Kept | _Alone | None = None

    def of(self, items: WorkList, is_sharing: NDArray[np.bool_], block_tables: NDArray[np.int32]) -> Clusters:
        """As `make_clusters`; while the same is shared, or nothing, `order` may be that of an earlier step's costs."""
        if self._kept is not None and self._kept.serves(items, is_sharing, block_tables):
            return self._kept.clusters
        clusters = make_clusters(items, is_sharing, block_tables, self._block_size, self._max_items)
        self._kept = None
        sizes = np.diff(clusters.starts)
        shared = clusters.order[np.repeat(sizes, sizes) > 1]
        if len(shared):
            ends = items.kv_ends[shared]
            num_blocks = -(-int(ends.max()) // self._block_size)
            self._kept = _Kept(clusters, items, is_sharing, shared, ends, block_tables[:, :num_blocks].copy())
        elif is_sharing.all():  # decodes, which grow slowly: the costliest ones stay so
            first_blocks = _first_blocks(items, block_tables, self._block_size)
            self._kept = _Alone(clusters, self._block_size, first_blocks)
        return clusters


@dataclass(frozen=True, slots=True)
class _Kept:
    """Clusters, and what they follow from. shared: items that are not alone in theirs; blocks: all tables' first ones,
    as far as those items read.
    """

    clusters: Clusters
    items: WorkList
    is_sharing: NDArray[np.bool_]
    shared: NDArray[np.int32]
    shared_ends: NDArray[np.int32]
    blocks: NDArray[np.int32]

    def serves(self, items: WorkList, is_sharing: NDArray[np.bool_], block_tables: NDArray[np.int32]) -> bool:
        """Whether the shared ones read what they did, and the others, which may have grown, are cut where they were."""
        return (
            np.array_equal(items.seqs, self.items.seqs)
            and np.array_equal(items.kv_starts, self.items.kv_starts)
            and np.array_equal(items.num_queries, self.items.num_queries)
            and np.array_equal(is_sharing, self.is_sharing)
            and np.array_equal(items.kv_ends[self.shared], self.shared_ends)
            and np.array_equal(block_tables[:, : self.blocks.shape[1]], self.blocks)
        )


@dataclass(frozen=True, slots=True)
class _Alone:
    """Clusters of one item each, whose first blocks were all different."""

    clusters: Clusters
    block_size: int
    first_blocks: NDArray[np.int32]

    def serves(self, items: WorkList, is_sharing: NDArray[np.bool_], block_tables: NDArray[np.int32]) -> bool:
        """Whether the first blocks, and that all may share, have stayed."""
        return (
            len(is_sharing) == len(self.first_blocks)
            and bool(is_sharing.all())
            and np.array_equal(_first_blocks(items, block_tables, self.block_size), self.first_blocks)
        )


def _first_blocks(items: WorkList, block_tables: NDArray[np.int32], block_size: int) -> NDArray[np.int32]:
    """[num_items], the first that each reads."""
    blocks: NDArray[np.int32] = block_tables[items.seqs, items.kv_starts // block_size]
    return blocks


def _first_alike(
    items: WorkList, sharing: NDArray[np.int64], block_tables: NDArray[np.int32], block_size: int
) -> NDArray[np.int64]:
    """Of each item of `sharing`, the index there of the first that reads the same: by a hash, then block by block."""
    seqs = items.seqs[sharing]
    starts, ends = items.kv_starts[sharing] // block_size, -(-items.kv_ends[sharing] // block_size)
    width = block_tables.shape[1]
    weights = _weights((width + 1).bit_length())[: width + 2]
    hashes = np.zeros((len(block_tables), block_tables.shape[1] + 1), np.int64)
    np.cumsum(block_tables * weights[2:], axis=1, out=hashes[:, 1:])
    lengths = items.kv_ends[sharing] * weights[0] + starts * weights[1]
    _, first, alike = np.unique(
        hashes[seqs, ends] - hashes[seqs, starts] + lengths, return_index=True, return_inverse=True
    )
    found = first[alike]
    # A table's last entry fills up what is shorter than the longest.
    columns = np.minimum(starts[:, None] + np.arange(int((ends - starts).max())), ends[:, None] - 1)
    blocks = block_tables[seqs[:, None], columns]
    is_same = (blocks == blocks[found]).all(axis=1) & (starts == starts[found]) & (ends == ends[found])
    is_same &= items.kv_ends[sharing] == items.kv_ends[sharing[found]]
    return np.where(is_same, found, np.arange(len(sharing)))


@cache
def _weights(bits: int) -> NDArray[np.int64]:
    """2^bits odd random numbers; sums of products with them wrap around."""
    numbers: NDArray[np.int64] = np.random.default_rng(0).integers(-(2**62), 2**62, 2**bits)
    return numbers | 1


def _int32(values: NDArray[np.int64]) -> NDArray[np.int32]:
    return values.astype(np.int32)
