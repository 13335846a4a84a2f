"""The packed work: every query token of the work list once, in the grid that it fits, in whole clusters."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.clusters import make_clusters
from kernels.cuda.work import DECODE_FIELDS, PREFILL_FIELDS, PackedWork, pack_work
from kernels.work_list import SplitRule, WorkList, make_work_list

MAX_BLOCKS = 50
lens = st.lists(st.tuples(st.integers(0, 700), st.one_of(st.just(1), st.integers(1, 90))), min_size=1, max_size=6)


class Packed:
    """A step's work and what is made of it."""

    def __init__(
        self, pairs: list[tuple[int, int]], tables: NDArray[np.int32], group_size: int, window: int, num_units: int
    ) -> None:
        before, new = np.array(pairs, np.int64).T
        self.group_size, self.max_decode_queries = group_size, 16 // group_size
        rule = SplitRule(64 // group_size, 32, 4, self.max_decode_queries)
        self.work = make_work_list(before + new, new, 16, window, rule)
        is_sharing = new[self.work.seqs] == 1
        clusters = make_clusters(self.work, is_sharing, tables, 16, self.max_decode_queries)
        self.packed = pack_work(self.work, clusters, self.max_decode_queries, num_units)
        self.units, self.decode, self.prefill = split(self.packed)

    def clusters(self) -> list[NDArray[np.int32]]:
        """The decode items of each."""
        found, start = [], 0
        while start < len(self.decode):
            found.append(self.decode[start : start + self.decode[start, 7]])
            start += len(found[-1])
        return found


def split(packed: PackedWork) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Unit starts, decode items, prefill items."""
    decode = packed.values[packed.decode_offset : packed.prefill_offset].reshape(-1, DECODE_FIELDS)
    prefill = packed.values[packed.prefill_offset :].reshape(-1, PREFILL_FIELDS)
    return packed.values[: packed.decode_offset], decode, prefill


def tokens(work: WorkList) -> list[tuple[int, ...]]:
    """Sequence, query, KV range of each query token of each item."""
    columns = (work.seqs, work.query_starts, work.num_queries, work.kv_starts, work.kv_ends)
    return [
        (seq, query, kv_start, kv_end)
        for seq, first, count, kv_start, kv_end in zip(*(c.tolist() for c in columns), strict=True)
        for query in range(first, first + count)
    ]


@given(lens, st.integers(1, 16), st.sampled_from([0, 50]), st.integers(1, 9), st.data())
def test_every_query_token_has_its_place(
    pairs: list[tuple[int, int]], group_size: int, window: int, num_units: int, data: st.DataObject
) -> None:
    """Few block ids, so that decodes share blocks in all ways."""
    ids = st.lists(st.integers(0, 1), min_size=MAX_BLOCKS, max_size=MAX_BLOCKS)
    tables = np.array(data.draw(st.lists(ids, min_size=len(pairs), max_size=len(pairs))), np.int32)
    found = Packed(pairs, tables, group_size, window, num_units)
    decode, prefill = found.decode, found.prefill
    of_prefill = [
        (seq, query, *kv) for seq, first, count, *kv in prefill.tolist() for query in range(first, first + count)
    ]
    assert sorted([*map(tuple, decode[:, :4].tolist()), *of_prefill]) == sorted(tokens(found.work))
    assert (prefill[:, 2] * group_size > 16).all()
    assert (prefill[:, 2] * group_size <= 64).all()
    assert (np.diff(prefill[:, 4] - prefill[:, 3]) <= 0).all()

    clusters = found.clusters()
    assert sum(map(len, clusters)) == len(decode)
    for cluster in clusters:
        assert len(cluster) * group_size <= 16
        ((kv_start, kv_end),) = set(map(tuple, cluster[:, 2:4].tolist()))
        blocks = slice(kv_start // 16, -(-kv_end // 16))
        assert (tables[cluster[:, 0], blocks] == tables[cluster[0, 0], blocks]).all()
    assert len(found.units) == found.packed.num_units + 1
    assert found.units[0] == 0
    assert found.units[-1] == len(decode)
    assert (np.diff(found.units) >= 0).all()
    assert set(found.units.tolist()) <= {0, *np.cumsum(list(map(len, clusters))).tolist()}, "units have whole clusters"

    rows: list[int] = []
    for query in set(decode[:, 1].tolist()):
        parts = decode[decode[:, 1] == query]
        parts = parts[np.argsort(parts[:, 5])]
        assert parts[:, 5].tolist() == list(range(len(parts)))
        assert (parts[:, 6] == len(parts)).all()
        assert (np.diff(parts[:, 2]) > 0).all()
        if len(parts) > 1:
            (first,) = set(parts[:, 4].tolist())
            rows += range(first, first + len(parts))
    assert sorted(rows) == list(range(found.packed.num_partial_rows)), "each row of partial results is one part's"


def test_a_shared_prefix_is_read_once_for_a_tile() -> None:
    """Nine sequences of four heads to a KV head, four to a tile; two shared partitions, and one that is not."""
    tables = np.tile(np.arange(9, dtype=np.int32), (9, 1))
    tables[:, 8] = np.arange(9) + 100
    found = Packed([(129, 1)] * 9, tables, 4, 0, 3)
    sizes = [len(cluster) for cluster in found.clusters()]
    assert sorted(sizes, reverse=True) == [4] * 4 + [1] * (2 + 9)
