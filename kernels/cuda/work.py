"""A step's work as the CUDA kernels read it: items by kernel, units of the decode grid, in one array.

Owns the layout of `struct DecodeItem` and `struct PrefillItem`. Borders are `kernels.work_list`'s, clusters
`kernels.clusters`'.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.clusters import Clusters
from kernels.work_list import WorkList, expand, pack

# Fields of arguments.cuh, each an int32.
# struct DecodeItem: seq, query, kv_start, kv_end, first_partial, part, num_parts, cluster_size.
DECODE_FIELDS = 8
# struct PrefillItem: seq, query_start, num_queries, kv_start, kv_end.
PREFILL_FIELDS = 5
# What a cluster costs beside its KV tokens, in KV tokens: queries in, sums out.
CLUSTER_OVERHEAD = 64


@dataclass(frozen=True, slots=True)
class PackedWork:
    """values: int32, the unit starts [num_units + 1], then the decode items, then the prefill items."""

    values: NDArray[np.int32]
    num_decode_items: int
    num_prefill_items: int
    num_units: int
    num_partial_rows: int

    @property
    def decode_offset(self) -> int:
        """Index of the first decode item's first field: the same for any step with decode items."""
        return self.num_units + 1

    @property
    def prefill_offset(self) -> int:
        """Index of the first prefill item's first field."""
        return self.decode_offset + self.num_decode_items * DECODE_FIELDS


def pack_work(work: WorkList, clusters: Clusters, max_decode_queries: int, num_units: int) -> PackedWork:
    """Items of at most `max_decode_queries` query tokens go to the decode grid of `num_units`, the others to prefill.

    Each cluster of the decode grid is done by one unit. A step without decode items has no units. All parts of a split
    tile are decode items.
    """
    is_decode = work.num_queries <= max_decode_queries
    assert (is_decode | (work.partials < 0)).all(), "prefill items are whole"
    decode, starts = _decode_items(work, clusters, is_decode)
    if len(decode) == 0:
        num_units = 0
    kv_lens = decode[starts, 3].astype(np.int64) - decode[starts, 2]
    units = pack(kv_lens + CLUSTER_OVERHEAD, num_units) if num_units else np.zeros(1, np.int32)
    unit_starts = np.append(starts, len(decode))[units]
    prefill = _prefill_items(work, ~is_decode)
    values = np.concatenate([unit_starts, decode.ravel(), prefill.ravel()]).astype(np.int32)
    return PackedWork(values, len(decode), len(prefill), num_units, work.num_partial_rows)


def _decode_items(
    work: WorkList, clusters: Clusters, is_decode: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """An item for each query token, [num_items, DECODE_FIELDS], and where clusters start.

    The query tokens of one sequence that fit a tile are a cluster too.
    """
    cluster_of, _ = expand(np.diff(clusters.starts).astype(np.int64))
    is_wanted = is_decode[clusters.order]
    order = clusters.order[is_wanted]
    places, offsets = expand(work.num_queries[order].astype(np.int64))
    items, cluster_of = order[places], cluster_of[is_wanted][places]
    starts = np.flatnonzero(np.diff(cluster_of, prepend=-1))
    cluster_sizes = np.zeros(len(items), np.int64)
    cluster_sizes[starts] = np.diff(starts, append=len(items))
    first_partials, parts, num_parts = _parts(work)
    decode = np.empty((len(items), DECODE_FIELDS), np.int32)
    decode[:, 0] = work.seqs[items]
    decode[:, 1] = work.query_starts[items] + offsets
    decode[:, 2] = work.kv_starts[items]
    decode[:, 3] = work.kv_ends[items]
    # A tile has as many rows of partial results as query tokens times parts; a token's lie together.
    decode[:, 4] = first_partials[items] + offsets * num_parts[items]
    decode[:, 5] = parts[items]
    decode[:, 6] = num_parts[items]
    decode[:, 7] = cluster_sizes
    return decode, starts


def _prefill_items(work: WorkList, is_prefill: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[num_items, PREFILL_FIELDS], the longest first: the blocks that start last then have the least to do."""
    columns = (work.seqs, work.query_starts, work.num_queries, work.kv_starts, work.kv_ends)
    prefill = np.stack([column[is_prefill] for column in columns], axis=1)
    return prefill[np.argsort(prefill[:, 3] - prefill[:, 4], kind="stable")]


def _parts(work: WorkList) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Of each item: where its tile's partial results begin, which part of the tile it is, and of how many."""
    first_partials, num_parts = work.partials.copy(), np.ones_like(work.seqs)
    parts = np.zeros(len(work.seqs), np.int64)
    tiles, offsets = expand(work.merge_counts.astype(np.int64))
    split = work.merge_items[tiles] + offsets
    first_partials[split] = work.partials[work.merge_items][tiles]
    parts[split] = offsets
    num_parts[split] = work.merge_counts[tiles]
    return first_partials, parts, num_parts
