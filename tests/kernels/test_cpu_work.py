"""The work of decodes, kept from step to step: the same as if it were made anew."""

from dataclasses import fields
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import AttentionMetadata, AttentionShape
from kernels.build import find_compiler
from kernels.cpu import MAX_PARTITIONS, PARTITION_LEN, CpuKernels
from kernels.cpu.work import DecodesWork

pytestmark = pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
BLOCK_SIZE = 16
MAX_BLOCKS = 3 * PARTITION_LEN // BLOCK_SIZE
LONGEST = BLOCK_SIZE * MAX_BLOCKS


@cache
def kernels() -> CpuKernels:
    return CpuKernels(AttentionShape(2, 1, 16, BLOCK_SIZE, 1.0, torch.float32, torch.float32))


def decodes(context_lens: NDArray[np.int64], tables: NDArray[np.int32]) -> AttentionMetadata:
    num_seqs = len(context_lens)
    return AttentionMetadata(
        block_tables=torch.from_numpy(tables),
        context_lens=torch.from_numpy(context_lens.astype(np.int32)),
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32),
        slot_mapping=torch.zeros(num_seqs, dtype=torch.int64),
        host_block_tables=tables,
        host_context_lens=context_lens,
        host_query_lens=np.ones(num_seqs, np.int64),
    )


def check(kept: DecodesWork, metadata: AttentionMetadata) -> None:
    """Against one that is made anew."""
    new = DecodesWork(kernels(), metadata)
    for field in fields(new._items):
        np.testing.assert_array_equal(getattr(kept._items, field.name), getattr(new._items, field.name), field.name)
    assert kept.num_steps_alike == new.num_steps_alike
    assert kept.num_items == new.num_items
    assert kept.work.kv_ends == kept._items.kv_ends.ctypes.data
    for name in ("block_tables", "context_lens", "cu_seqlens_q", "table_stride", "num_merges", "num_threads"):
        assert getattr(kept.work, name) == getattr(new.work, name), name
    assert kept._clusters is not None
    order, starts = kept._clusters.order, kept._clusters.starts
    assert sorted(order.tolist()) == list(range(kept.num_items))
    assert (kept.work.order, kept.work.cluster_starts) == (order.ctypes.data, starts.ctypes.data)
    assert kept.work.num_clusters == len(starts) - 1
    for begin, end in pairwise(starts):
        assert len({reads(kept, metadata, item) for item in order[begin:end]}) == 1


def reads(work: DecodesWork, metadata: AttentionMetadata, item: int) -> tuple[int, int, tuple[int, ...]]:
    """Which tokens of which blocks."""
    first, last = int(work._items.kv_starts[item]), int(work._items.kv_ends[item])
    table = metadata.host_block_tables[work._items.seqs[item]]
    return first, last, tuple(table[first // BLOCK_SIZE : -(-last // BLOCK_SIZE)].tolist())


@settings(max_examples=60)
@given(st.lists(st.integers(1, LONGEST - 60), min_size=1, max_size=6), st.booleans(), st.data())
def test_work_that_grows_is_what_would_be_made_anew(lens: list[int], shares: bool, data: st.DataObject) -> None:
    """Of steps whose sequences grow together, and of those in which something else changes."""
    context_lens = np.array(lens)
    tables = np.arange(len(lens) * MAX_BLOCKS, dtype=np.int32).reshape(len(lens), MAX_BLOCKS)
    if shares:
        tables[:, : PARTITION_LEN // BLOCK_SIZE] = tables[0, : PARTITION_LEN // BLOCK_SIZE]
    kept = DecodesWork(kernels(), decodes(context_lens, tables))
    for _ in range(6):
        num_alike = kept.num_steps_alike
        change = data.draw(st.sampled_from(["grow", "grow much", "one grows", "one leaves", "a block"]))
        seq = data.draw(st.integers(0, len(context_lens) - 1))
        grown = data.draw(st.integers(1, 9)) if change == "grow much" else int(change == "grow")
        context_lens, tables = context_lens + grown, tables.copy()
        if change == "one grows":
            context_lens[seq] += 1
        elif change == "one leaves" and len(context_lens) > 1:
            tables, context_lens = np.delete(tables, seq, 0), np.delete(context_lens, seq)
        elif change == "a block":
            tables[seq, data.draw(st.integers(0, MAX_BLOCKS - 1))] = data.draw(st.integers(0, tables.size))
        metadata = decodes(context_lens, tables)
        if kept.grows_to(metadata):
            check(kept, metadata)
        else:
            assert not change.startswith("grow") or grown >= num_alike
            kept = DecodesWork(kernels(), metadata)


def test_where_partitions_double_it_is_made_anew() -> None:
    longest = PARTITION_LEN * MAX_PARTITIONS
    tables = np.zeros((1, longest // BLOCK_SIZE + 1), np.int32)
    kept = DecodesWork(kernels(), decodes(np.array([longest - 1]), tables))
    assert kept.grows_to(decodes(np.array([longest]), tables))
    assert not kept.grows_to(decodes(np.array([longest + 1]), tables))
    assert len(DecodesWork(kernels(), decodes(np.array([longest + 1]), tables))._items.seqs) == MAX_PARTITIONS // 2 + 1
