"""A step's work as the CUDA kernels read it: items by kernel, units of the decode grid, in one array.

Owns the layout of `struct Item`. Borders are `kernels.work_list`'s.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.work_list import WorkList, pack

# struct Item in arguments.cuh, each an int32: seq, query_start, num_queries, kv_start, kv_end, partial, first_partial,
# num_parts.
ITEM_FIELDS = 8
# What an item costs beside its KV tokens, in KV tokens: queries in, sums out.
ITEM_OVERHEAD = 64


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
        return self.decode_offset + self.num_decode_items * ITEM_FIELDS


def pack_work(work: WorkList, max_decode_queries: int, num_units: int) -> PackedWork:
    """Items of at most `max_decode_queries` query tokens go to the decode grid of `num_units`, the others to prefill.

    A step without decode items has no units. All parts of a split tile are decode items.
    """
    first_partials, num_parts = _parts(work)
    columns = (work.seqs, work.query_starts, work.num_queries, work.kv_starts, work.kv_ends, work.partials)
    items = np.stack([*columns, first_partials, num_parts], axis=1)
    is_decode = work.num_queries <= max_decode_queries
    assert (is_decode | (work.partials < 0)).all(), "prefill items are whole"
    decode, prefill = items[is_decode], items[~is_decode]
    kv_lens = (work.kv_ends - work.kv_starts).astype(np.int64)
    if len(decode) == 0:
        num_units = 0
    unit_starts = pack(kv_lens[is_decode] + ITEM_OVERHEAD, num_units) if num_units else np.zeros(1, np.int32)
    # The longest first: the blocks that start last then have the least to do.
    prefill = prefill[np.argsort(-kv_lens[~is_decode], kind="stable")]
    values = np.concatenate([unit_starts, decode.ravel(), prefill.ravel()]).astype(np.int32)
    return PackedWork(values, len(decode), len(prefill), num_units, work.num_partial_rows)


def _parts(work: WorkList) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Of each item: where the partial results of its tile begin, and into how many parts the tile is split."""
    first_partials, num_parts = work.partials.copy(), np.ones_like(work.seqs)
    counts = work.merge_counts
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    split = np.repeat(work.merge_items, counts) + offsets
    first_partials[split] = np.repeat(work.partials[work.merge_items], counts)
    num_parts[split] = np.repeat(counts, counts)
    return first_partials, num_parts
