"""Clusters: every item once, together only with those that read the same blocks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.clusters import ClusterKeeper, Clusters, make_clusters
from kernels.work_list import SplitRule, WorkList, make_work_list

BLOCK_SIZE = 16
MAX_ITEMS = 8
RULE = SplitRule(query_tile=8, partition_len=64, max_partitions=4, max_split_queries=1, split_tails=False)


def work(lens: list[int]) -> WorkList:
    """Decodes."""
    return make_work_list(np.array(lens), np.ones(len(lens), np.int64), BLOCK_SIZE, 0, RULE)


def clusters(items: WorkList, tables: NDArray[np.int32]) -> Clusters:
    return make_clusters(items, np.ones(len(items.seqs), np.bool_), tables, BLOCK_SIZE, MAX_ITEMS)


def members(found: Clusters) -> list[list[int]]:
    return [found.order[a:b].tolist() for a, b in zip(found.starts, found.starts[1:], strict=False)]


def reads(items: WorkList, tables: NDArray[np.int32], item: int) -> tuple[int, int, tuple[int, ...]]:
    start, end = int(items.kv_starts[item]), int(items.kv_ends[item])
    blocks = tables[items.seqs[item], start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
    return start, end, tuple(blocks.tolist())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.data())
def test_together_are_those_that_read_the_same_and_only_they(lens: list[int], data: st.DataObject) -> None:
    """Few block ids, so that tables share runs in all ways."""
    ids = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=20, max_size=20), min_size=len(lens), max_size=len(lens))
    )
    tables = np.array(ids, np.int32)
    items = work(lens)
    found = members(clusters(items, tables))
    assert sorted(item for cluster in found for item in cluster) == list(range(len(items.seqs)))
    by_reads: dict[tuple[int, int, tuple[int, ...]], int] = {}
    for number, cluster in enumerate(found):
        (same,) = {reads(items, tables, item) for item in cluster}
        assert by_reads.setdefault(same, number) == number, "each set of blocks in one cluster"
    costs = [int(items.costs[cluster].sum()) for cluster in found]
    assert costs == sorted(costs, reverse=True)


def test_a_large_cluster_is_cut() -> None:
    items = work([64] * (2 * MAX_ITEMS + 3))
    tables = np.zeros((len(items.seqs), 4), np.int32)
    assert sorted(map(len, members(clusters(items, tables)))) == [3, MAX_ITEMS, MAX_ITEMS]


@given(st.lists(st.integers(1, 300), min_size=2, max_size=8), st.data())
def test_those_who_are_kept_together_read_the_same(lens: list[int], data: st.DataObject) -> None:
    keeper = ClusterKeeper(BLOCK_SIZE, MAX_ITEMS)
    tables = np.tile(np.arange(20, dtype=np.int32), (len(lens), 1))
    context_lens = np.array(lens)
    for _ in range(4):
        items = work(context_lens.tolist())
        is_sharing = np.ones(len(items.seqs), np.bool_)
        found = members(keeper.of(items, is_sharing, tables))
        assert sorted(item for cluster in found for item in cluster) == list(range(len(items.seqs)))
        assert all(len({reads(items, tables, item) for item in cluster}) == 1 for cluster in found)
        change = data.draw(st.sampled_from(["all grow", "one grows", "one leaves", "a block", "nothing"]))
        seq = data.draw(st.integers(0, len(context_lens) - 1))
        if change == "all grow":
            context_lens = context_lens + 1
        elif change == "one grows":
            context_lens[seq] += data.draw(st.integers(1, 16))
        elif change == "one leaves" and len(context_lens) > 1:
            tables, context_lens = np.delete(tables, seq, 0), np.delete(context_lens, seq)
        elif change == "a block":
            tables[seq, data.draw(st.integers(0, 19))] = data.draw(st.integers(0, 40))


def test_clusters_are_kept_while_those_who_are_alone_grow() -> None:
    keeper, tables = ClusterKeeper(BLOCK_SIZE, MAX_ITEMS), np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], np.int32)
    is_sharing = np.ones(4, np.bool_)
    first, second = (keeper.of(work([n, n]), is_sharing, tables) for n in (66, 67))
    assert second is first
    assert len(members(first)) == 3
    tables[1, 2] = 9
    assert len(members(keeper.of(work([68, 68]), is_sharing, tables))) == 4


def test_who_may_not_share_stays_alone() -> None:
    items = work([64, 64, 64])
    tables = np.zeros((3, 4), np.int32)
    found = make_clusters(items, np.array([True, False, True]), tables, BLOCK_SIZE, MAX_ITEMS)
    assert sorted(members(found)) == [[0, 2], [1]]
