"""The worked numbers of the literature on KV memory, held against the accounting that `make bench-memory` prints.

Dense is a reservation in a real free list; paged is what the planner's block manager takes, or the pool's own format.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.kv_format import KVFormat
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from tests.load.memory.accounting import (
    MemoryUse,
    Reservation,
    Table,
    dense_use,
    paged_use,
    saved_by_sharing,
)
from tests.load.memory.ranges import RangeAllocator
from tests.load.memory.sharing import shared_prompt
from tests.unit.worker_harness import Planner
from worker.batch import Batch
from worker.kv_pool import block_bytes
from worker.step import BatchLimits
from worker.wire import decode_plan


def dense(num_slots: int, lengths: Sequence[int]) -> MemoryUse:
    """Each sequence in a range of `num_slots`, in a memory that has just as many; none will grow."""
    ranges = RangeAllocator(num_slots * len(lengths))
    for _ in lengths:
        assert ranges.allocate(num_slots) is not None
    return dense_use(ranges, [Reservation(num_slots, length, length) for length in lengths])


def paged(block_size: int, lengths: Sequence[int], num_blocks: int = 4096) -> MemoryUse:
    """Each sequence in blocks of its own."""
    blocks = BlockManager(num_blocks, Changes())
    tables = [
        Table(blocks.reserve(seq_id, (), -(-length // block_size)), length) for seq_id, length in enumerate(lengths)
    ]
    return paged_use(blocks, block_size, tables)


@pytest.mark.parametrize(
    ("num_reserved", "num_used", "wasted_percent"),
    [(2048, 600, 70.7), (4096, 900, 78.0), (4096, 200, 95.1), (8192, 10, 99.9)],
)
def test_a_reservation_for_the_longest_is_mostly_waste(num_reserved: int, num_used: int, wasted_percent: float) -> None:
    use = dense(num_reserved, [num_used])
    assert round(100 * use.wasted, 1) == wasted_percent
    assert use.internal == num_reserved - num_used


@pytest.mark.parametrize(
    ("block_size", "num_used", "num_slots", "wasted_percent"),
    [(16, 600, 608, 1.3), (16, 900, 912, 1.3), (32, 900, 928, 3.0), (16, 200, 208, 3.8), (16, 10, 16, 37.5)],
)
def test_blocks_waste_the_rest_of_the_last_one(
    block_size: int, num_used: int, num_slots: int, wasted_percent: float
) -> None:
    use = paged(block_size, [num_used])
    assert use.tokens + use.internal == num_slots
    assert round(100 * use.wasted, 1) == wasted_percent
    assert use.wasted == use.least_wasted


def test_32_users_of_8192_slots_at_512_tokens_waste_15_of_16() -> None:
    lengths = [512 + 32 * (user % 16) - 240 for user in range(32)]
    assert sum(lengths) == 32 * 512
    assert dense(8192, lengths).wasted == 15 / 16
    assert paged(16, lengths).wasted < 0.02


def test_part_of_a_reservation_is_only_not_filled_yet() -> None:
    """Of 2,048 slots, 161 + 338 tokens will come and 200 are there."""
    ranges = RangeAllocator(2048)
    ranges.allocate(2048)
    use = dense_use(ranges, [Reservation(2048, num_tokens=200, max_num_tokens=499)])
    assert (use.tokens, use.reserved, use.internal) == (200, 299, 1549)


def test_a_prompt_of_100_users_is_stored_once() -> None:
    saving = shared_prompt(num_users=100, num_prompt_tokens=5000)
    assert saving.num_read > 500_000
    num_own = 100 * (5000 % 16 + 16)  # behind the prompt's last full block
    assert 4992 < saving.num_stored <= 4992 + num_own
    assert saving.saved > 0.98


def test_blocks_that_two_tables_name_count_once() -> None:
    blocks = BlockManager(8, Changes())
    first = blocks.reserve(1, (), 3)
    for position in range(2):
        blocks.publish(first[position], bytes([position]))
    second = blocks.reserve(2, first[:2], 1)
    use = paged_use(blocks, 16, [Table(first, 40), Table(second, 33)])
    assert (use.tokens, use.internal, use.free) == (32 + 8 + 1, 8 + 15, 4 * 16)
    assert saved_by_sharing([first, second]) == pytest.approx(2 / 6)
    blocks.release(1, first)
    blocks.release(2, second)
    cached = paged_use(blocks, 16, [])
    assert (blocks.num_cached_blocks, cached.wasted, cached.free) == (2, 0, 8 * 16)


def test_blocks_taken_ahead_are_wasted_beyond_what_blocks_must() -> None:
    blocks = BlockManager(8, Changes())
    use = paged_use(blocks, 16, [Table(blocks.reserve(1, (), 3), 20)])
    assert (use.internal, use.tail) == (28, 12)
    assert use.wasted == 28 / 48
    assert use.least_wasted == 12 / 32


def test_ragged_rows_hold_what_padded_ones_pad() -> None:
    """Lengths 200, 1,500 and 60: padded to the longest, and as our batch runs and keeps them."""
    lengths = [200, 1500, 60]
    padded, ragged = dense(max(lengths), lengths), paged(16, lengths)
    assert (padded.tokens, padded.internal) == (1760, 4500 - 1760)
    assert (ragged.tokens, ragged.internal) == (1760, 8 + 4 + 4)
    planner = Planner(block_size=16, num_blocks=200)
    for seq_id, length in enumerate(lengths, start=1):
        planner.add(seq_id, [1] * length)
    batch = Batch(BatchLimits(block_size=16, max_num_seqs=4, max_num_batched_tokens=2048, max_model_len=2048))
    inputs = batch.apply(decode_plan(planner.plan(dict(enumerate(lengths, start=1)))))
    assert len(inputs.input_ids) == 1760
    assert np.array_equal(inputs.cu_seqlens_q, [0, 200, 1700, 1760])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_at_most_15_slots_of_a_sequence_are_empty(lengths: list[int]) -> None:
    use = paged(16, lengths)
    assert use.internal == use.tail <= 15 * len(lengths)
    assert use.whole == 4096 * 16


def test_a_13b_model_s_block_of_one_head_has_2048_elements() -> None:
    """40 layers of 40 heads of 128 dimensions in 16 bits: 800 KiB a token, 1.6 GiB for 2,048 of them."""
    kv_format = KVFormat(torch.float16, num_kv_heads=40, head_dim=128, block_size=16, key_group=128)
    block = torch.zeros(kv_format.head_bytes, dtype=torch.uint8)
    assert kv_format.keys(block).numel() == kv_format.values(block).numel() == 16 * 128 == 2048
    assert block_bytes(40, kv_format) == 16 * 800 * 1024
    assert block_bytes(40, kv_format) * 2048 // 16 == 1.5625 * 2**30


def test_holes_refuse_a_request_that_blocks_take() -> None:
    """Eight ranges of 256 slots, every other one given back: 1,024 are free, and 512 cannot be had."""
    ranges, blocks = RangeAllocator(2048), BlockManager(2048 // 16, Changes())
    starts = [ranges.allocate(256) for _ in range(8)]
    tables = [blocks.reserve(seq_id, (), 256 // 16) for seq_id in range(8)]
    for i in range(0, 8, 2):
        ranges.release(starts[i] or 0, 256)
        blocks.release(i, tables[i])
    assert ranges.num_free_slots == 1024
    assert ranges.allocate(512) is None
    use = dense_use(ranges, [Reservation(256, 256, 256)] * 4, num_wanted=512)
    assert (use.external, use.wasted) == (1024, 0.5)
    assert dense_use(ranges, [Reservation(256, 256, 256)] * 4, num_wanted=2000).external == 0, "too much for any memory"
    table = blocks.reserve(9, (), 512 // 16)
    use = paged_use(blocks, 16, [*(Table(tables[i], 256) for i in range(1, 8, 2)), Table(table, 512)])
    assert (use.tokens, use.internal, use.free) == (1024 + 512, 0, 512)
