"""What one step's attention is cut into, made once on the host and used by every layer with the same window.

Owns the borders: query tokens are cut into tiles, the KV tokens that a tile sees into partitions (split-KV). Borders
follow from a sequence's own lengths alone. `pack` merely assigns items to workers, and the partial results of a tile
are merged in the order of their partitions, so no result depends on the batch. Needs numpy only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How a device cuts.

    query_tile: query tokens of a tile at most.
    partition_len: KV tokens of a partition, a multiple of the block size; doubled for a tile until max_partitions do.
    max_split_queries: a tile with more query tokens is not split over KV tokens (it is busy enough as it is).
    split_tails: whether that goes for the last tile of a longer prompt too; if not, it is as whole as the others.
    """

    query_tile: int
    partition_len: int
    max_partitions: int
    max_split_queries: int
    split_tails: bool = True


@dataclass(frozen=True, slots=True)
class WorkList:
    """Items, and the merges that follow them. Every item is done once per KV head.

    seqs: [num_items] int32. query_starts, num_queries: [num_items] int32, rows of the query.
    kv_starts, kv_ends: [num_items] int32, KV tokens from the sequence's first; a start lies on a block's border.
    partials: [num_items] int32, the item's first row among the partial results, or -1: it writes the output itself.
    merge_items: [num_merges] int32, the first item of each tile that was split; its other partitions follow it.
    merge_counts: [num_merges] int32, items of the tile.
    num_partial_rows: rows of partial results, one per query token and partition.
    """

    seqs: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    num_queries: NDArray[np.int32]
    kv_starts: NDArray[np.int32]
    kv_ends: NDArray[np.int32]
    partials: NDArray[np.int32]
    merge_items: NDArray[np.int32]
    merge_counts: NDArray[np.int32]
    num_partial_rows: int

    @property
    def costs(self) -> NDArray[np.int64]:
        """Pairs of query and KV token per item: [num_items]."""
        return (self.kv_ends - self.kv_starts).astype(np.int64) * self.num_queries


def make_work_list(
    context_lens: NDArray[np.int64],
    query_lens: NDArray[np.int64],
    block_size: int,
    sliding_window: int,
    rule: SplitRule,
) -> WorkList:
    """Cut a step. context_lens, query_lens: [num_seqs]; a sequence's query tokens are the last of its KV tokens.

    A sliding_window of 0 is full attention.
    """
    if not sliding_window and rule.max_split_queries and int(query_lens.max()) == 1:
        return cut_decodes(context_lens, rule)
    return cut(context_lens, query_lens, block_size, sliding_window, rule)


def cut(
    context_lens: NDArray[np.int64],
    query_lens: NDArray[np.int64],
    block_size: int,
    sliding_window: int,
    rule: SplitRule,
) -> WorkList:
    """Any step; as above."""
    num_tiles = -(-query_lens // rule.query_tile)
    seqs, tile_index = expand(num_tiles)
    offsets = tile_index * rule.query_tile
    num_queries = np.minimum(rule.query_tile, query_lens[seqs] - offsets)
    query_starts = (np.cumsum(query_lens) - query_lens)[seqs] + offsets
    first_positions = (context_lens - query_lens)[seqs] + offsets
    kv_ends = first_positions + num_queries
    kv_starts = np.maximum(0, first_positions - sliding_window + 1) if sliding_window else np.zeros_like(kv_ends)
    kv_starts -= kv_starts % block_size

    deciding_lens = num_queries if rule.split_tails else query_lens[seqs]
    lens = np.where(deciding_lens <= rule.max_split_queries, partition_lens(kv_ends, rule), kv_ends)
    first_partitions = kv_starts // lens
    num_partitions = -(-kv_ends // lens) - first_partitions
    tiles, partition_index = expand(num_partitions)
    partitions = first_partitions[tiles] + partition_index
    is_split = num_partitions[tiles] > 1
    rows = np.where(is_split, num_queries[tiles], 0)
    split_tiles = np.flatnonzero(num_partitions > 1)
    return WorkList(
        seqs=_int32(seqs[tiles]),
        query_starts=_int32(query_starts[tiles]),
        num_queries=_int32(num_queries[tiles]),
        kv_starts=_int32(np.maximum(kv_starts[tiles], partitions * lens[tiles])),
        kv_ends=_int32(np.minimum(kv_ends[tiles], (partitions + 1) * lens[tiles])),
        partials=_int32(np.where(is_split, np.cumsum(rows) - rows, -1)),
        merge_items=_int32((np.cumsum(num_partitions) - num_partitions)[split_tiles]),
        merge_counts=_int32(num_partitions[split_tiles]),
        num_partial_rows=int(rows.sum()),
    )


def cut_decodes(context_lens: NDArray[np.int64], rule: SplitRule) -> WorkList:
    """What `cut` finds, sooner, where everybody runs one token, without a window."""
    longest = int(context_lens.max())
    if longest <= rule.partition_len:
        return _whole_decodes(context_lens)
    is_doubled = longest > rule.partition_len * rule.max_partitions
    lens: NDArray[np.int64] | int = partition_lens(context_lens, rule) if is_doubled else rule.partition_len
    counts = -(-context_lens // lens)
    seqs, partitions = expand(counts)
    kv_starts = partitions * (lens if isinstance(lens, int) else lens[seqs])
    kv_ends = np.minimum(kv_starts + (lens if isinstance(lens, int) else lens[seqs]), context_lens[seqs])
    is_split, split = counts[seqs] > 1, np.flatnonzero(counts > 1)
    owners = _int32(seqs)
    return WorkList(
        seqs=owners,
        query_starts=owners,
        num_queries=np.ones_like(owners),
        kv_starts=_int32(kv_starts),
        kv_ends=_int32(kv_ends),
        partials=_int32(np.where(is_split, np.cumsum(is_split) - 1, -1)),
        merge_items=_int32((np.cumsum(counts) - counts)[split]),
        merge_counts=_int32(counts[split]),
        num_partial_rows=int(counts[split].sum()),
    )


def _whole_decodes(context_lens: NDArray[np.int64]) -> WorkList:
    """The same where no context is long enough to be cut."""
    seqs = np.arange(len(context_lens), dtype=np.int32)
    none = np.zeros(0, np.int32)
    return WorkList(
        seqs=seqs,
        query_starts=seqs,
        num_queries=np.ones_like(seqs),
        kv_starts=np.zeros_like(seqs),
        kv_ends=_int32(context_lens),
        partials=np.full_like(seqs, -1),
        merge_items=none,
        merge_counts=none,
        num_partial_rows=0,
    )


def num_steps_alike(context_lens: NDArray[np.int64], rule: SplitRule) -> int:
    """How many decodes of the same sequences, one after the other from these lengths on, are cut into as many items.

    Only a sequence's last item then grows. 1 where there is no telling.
    """
    if int(context_lens.max()) >= rule.partition_len * rule.max_partitions:
        return 1
    return int((-context_lens % rule.partition_len).min()) + 1


def partition_lens(kv_ends: NDArray[np.int64], rule: SplitRule) -> NDArray[np.int64]:
    """KV tokens of a partition of each tile, by the position that it ends at and nothing else."""
    most = rule.partition_len * rule.max_partitions
    doublings = np.ceil(np.log2(np.maximum(1, kv_ends / most))).astype(np.int64)
    return rule.partition_len << doublings


def pack(costs: NDArray[np.int64], num_workers: int) -> NDArray[np.int32]:
    """Contiguous runs of about equal cost: worker i does items offsets[i] to offsets[i + 1].

    costs: [num_items], positive; returns offsets: [num_workers + 1]. No run costs more than the mean and one item.
    """
    ends = np.cumsum(costs)
    total = int(ends[-1]) if len(ends) else 0
    shares = np.arange(1, num_workers) * total / num_workers
    middles = ends - costs / 2
    return _int32(np.concatenate([[0], np.searchsorted(middles, shares), [len(costs)]]))


def expand(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index i counts[i] times, and beside it 0, 1, 2 ... within each."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _int32(values: NDArray[np.int64]) -> NDArray[np.int32]:
    return values.astype(np.int32)
