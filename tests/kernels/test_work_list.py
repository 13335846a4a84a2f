"""Work lists: every pair of query and visible KV token once, by borders that no neighbour moves."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.work_list import (
    SplitRule,
    WorkList,
    cut,
    cut_decodes,
    make_work_list,
    num_steps_alike,
    pack,
    partition_lens,
)

BLOCK_SIZE = 16

rules = st.builds(
    SplitRule,
    query_tile=st.sampled_from([1, 4, 16, 64]),
    partition_len=st.sampled_from([16, 32, 128]),
    max_partitions=st.integers(1, 8),
    max_split_queries=st.sampled_from([0, 1, 16]),
    split_tails=st.booleans(),
)
lens = st.lists(st.tuples(st.integers(0, 700), st.one_of(st.just(1), st.integers(1, 90))), min_size=1, max_size=6)
windows = st.sampled_from([0, 0, 1, 16, 100])


def make(pairs: list[tuple[int, int]], window: int, rule: SplitRule) -> WorkList:
    """pairs: per sequence, KV tokens before the step and query tokens in it."""
    before, new = np.array(pairs, np.int64).T
    return make_work_list(before + new, new, BLOCK_SIZE, window, rule)


@given(lens, windows, rules)
def test_covers_what_each_query_sees_once(pairs: list[tuple[int, int]], window: int, rule: SplitRule) -> None:
    work = make(pairs, window, rule)
    seen = [np.zeros((new, before + new), np.int64) for before, new in pairs]
    firsts = np.cumsum([0, *(new for _, new in pairs)])
    for i, seq in enumerate(work.seqs):
        start = work.query_starts[i] - firsts[seq]
        seen[seq][start : start + work.num_queries[i], work.kv_starts[i] : work.kv_ends[i]] += 1
        assert 0 < work.num_queries[i] <= rule.query_tile
        assert work.kv_starts[i] % BLOCK_SIZE == 0
        assert work.kv_starts[i] < work.kv_ends[i]
    for (before, new), counts in zip(pairs, seen, strict=True):
        positions = before + np.arange(new)
        distances = positions[:, None] - np.arange(before + new)
        visible = (distances >= 0) & ((distances < window) if window else True)
        assert (counts[visible] == 1).all()
        assert counts.max() == 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), rules.filter(lambda rule: rule.max_split_queries > 0))
def test_decodes_are_cut_as_any_step(context_lens: list[int], rule: SplitRule) -> None:
    lens, ones = np.array(context_lens), np.ones(len(context_lens), np.int64)
    found, expected = cut_decodes(lens, rule), cut(lens, ones, BLOCK_SIZE, 0, rule)
    for field in dataclasses.fields(WorkList):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


@given(st.lists(st.integers(1, 600), min_size=1, max_size=6), rules.filter(lambda rule: rule.max_split_queries > 0))
def test_only_last_items_grow_until_a_sequence_begins_another(context_lens: list[int], rule: SplitRule) -> None:
    lens = np.array(context_lens)
    num_steps, first = num_steps_alike(lens, rule), cut_decodes(lens, rule)
    is_last = np.diff(first.seqs, append=-1) != 0
    for step in range(num_steps):
        found = cut_decodes(lens + step, rule)
        expected = dataclasses.replace(first, kv_ends=first.kv_ends + step * is_last)
        for field in dataclasses.fields(WorkList):
            assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name
    if lens.max() + num_steps <= rule.partition_len * rule.max_partitions:
        assert len(cut_decodes(lens + num_steps, rule).seqs) != len(first.seqs)


@given(lens, windows, rules)
def test_each_split_tile_has_rows_of_its_own_and_is_merged_once(
    pairs: list[tuple[int, int]], window: int, rule: SplitRule
) -> None:
    work = make(pairs, window, rule)
    rows = np.zeros(work.num_partial_rows, np.int64)
    merged = np.zeros(len(work.seqs), np.int64)
    for first, count in zip(work.merge_items, work.merge_counts, strict=True):
        assert 1 < count <= rule.max_partitions
        tile = slice(first, first + count)
        merged[tile] += 1
        assert len(set(work.query_starts[tile])) == 1
        assert (work.kv_starts[tile][1:] == work.kv_ends[tile][:-1]).all(), "in the order of their KV tokens"
        for partial, num_queries in zip(work.partials[tile], work.num_queries[tile], strict=True):
            rows[partial : partial + num_queries] += 1
    assert (rows == 1).all()
    assert (merged == (work.partials >= 0)).all()


@given(lens, windows, rules)
def test_borders_do_not_depend_on_neighbours(pairs: list[tuple[int, int]], window: int, rule: SplitRule) -> None:
    together = make(pairs, window, rule)
    for seq, pair in enumerate(pairs):
        alone, here = make([pair], window, rule), together.seqs == seq
        assert (together.kv_starts[here] == alone.kv_starts).all()
        assert (together.kv_ends[here] == alone.kv_ends).all()
        assert (together.num_queries[here] == alone.num_queries).all()


def test_a_prompt_s_tail_is_split_only_where_the_rule_says_so() -> None:
    rule = SplitRule(query_tile=4, partition_len=16, max_partitions=8, max_split_queries=1)
    assert make([(100, 5)], 0, rule).num_queries.tolist() == [4, *[1] * 7]
    assert make([(100, 5)], 0, dataclasses.replace(rule, split_tails=False)).num_queries.tolist() == [4, 1]
    assert len(make([(100, 1)], 0, dataclasses.replace(rule, split_tails=False)).seqs) == 7


def test_partitions_double_where_there_would_be_too_many() -> None:
    rule = SplitRule(query_tile=1, partition_len=256, max_partitions=4, max_split_queries=1)
    found = partition_lens(np.array([1, 1024, 1025, 2048, 2049, 100_000]), rule)
    assert found.tolist() == [256, 256, 512, 512, 1024, 32768]


costs = st.lists(st.integers(1, 10_000), max_size=60).map(lambda values: np.array(values, np.int64))


@given(costs, st.integers(1, 40))
def test_packing_is_contiguous_and_even(values: NDArray[np.int64], num_workers: int) -> None:
    offsets = pack(values, num_workers)
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    assert (np.diff(offsets) >= 0).all()
    for start, end in itertools.pairwise(offsets):
        assert values[start:end].sum() <= values.sum() / num_workers + values.max(initial=0)
