"""KV writes and block copies, emulated, against the reference kernels."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import AttentionMetadata, AttentionShape, BlockCopy, LayerKV
from kernels.cuda.attention import CudaKernels, Tuning, independent_runs
from kernels.cuda.variant import Variant
from kernels.reference import ReferenceKernels
from tests.kernels.cuda.steps import EMULATION
from tests.kernels.guarded import guarded

NUM_BLOCKS = 6
CPU = torch.device("cpu")

variants = st.sampled_from(
    [Variant(torch.bfloat16, 64, 16), Variant(torch.float16, 80, 32), Variant(torch.float32, 64, 16)]
)
copies = st.builds(
    BlockCopy, st.integers(0, NUM_BLOCKS - 1), st.integers(0, NUM_BLOCKS - 1), st.integers(1, 16)
).filter(lambda copy: copy.src_block_id != copy.dst_block_id)


def kernels_for(variant: Variant, num_heads: int, num_kv_heads: int) -> CudaKernels:
    shape = AttentionShape(num_heads, num_kv_heads, variant.head_dim, variant.block_size, 1.0)
    return CudaKernels(CPU, shape, EMULATION, Tuning())


def metadata_of(slots: torch.Tensor) -> AttentionMetadata:
    """One sequence per token; only slot_mapping counts."""
    ones = np.ones(len(slots), np.int64)
    empty = torch.zeros((len(slots), 1), dtype=torch.int32)
    return AttentionMetadata(empty, empty[:, 0], torch.arange(len(slots) + 1).int(), slots, ones, ones)


@settings(max_examples=25, deadline=None)
@given(variants, st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))
def test_writes_its_slots_and_no_other(
    variant: Variant, num_kv_heads: int, group_size: int, num_tokens: int, is_view: bool, seed: int
) -> None:
    """Keys and values may be parts of one tensor of all heads, as the decoder has them."""
    rng = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * group_size
    slots = torch.randperm(NUM_BLOCKS * variant.block_size, generator=rng)[:num_tokens]
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, variant.head_dim, generator=rng).to(variant.dtype)
    _, key, value = torch.split(guarded(heads), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if not is_view:
        key, value = guarded(key), guarded(value)
    pool_shape = (NUM_BLOCKS, num_kv_heads, variant.block_size, variant.head_dim)
    before = torch.full(pool_shape, float("nan"), dtype=variant.dtype)
    found, expected = (LayerKV(guarded(before), guarded(before)) for _ in range(2))
    kernels = kernels_for(variant, num_heads, num_kv_heads)
    kernels.prepare(metadata_of(guarded(slots))).write_kv(key, value, found)
    ReferenceKernels(CPU, kernels.shape).prepare(metadata_of(slots)).write_kv(key, value, expected)
    assert torch.equal(bits(found.keys), bits(expected.keys))
    assert torch.equal(bits(found.values), bits(expected.values))


@settings(max_examples=25, deadline=None)
@given(variants, st.integers(1, 3), st.integers(1, 3), st.lists(copies, max_size=6), st.integers(0, 2**32 - 1))
def test_copies_as_if_in_order(
    variant: Variant, num_layers: int, num_kv_heads: int, wanted: list[BlockCopy], order_seed: int
) -> None:
    """Chains and swaps among them included."""
    pool = torch.randn(num_layers, 2, NUM_BLOCKS, num_kv_heads, variant.block_size, variant.head_dim)
    found = guarded(pool.to(variant.dtype))
    expected = pool.to(variant.dtype)
    kernels = kernels_for(variant, num_kv_heads, num_kv_heads)
    kernels.library(variant.dtype, has_window=False).seed_emulation(order_seed)
    kernels.copy_blocks(found, wanted)
    ReferenceKernels(CPU, kernels.shape).copy_blocks(expected, wanted)
    assert torch.equal(found, expected)


@given(st.lists(copies, min_size=1, max_size=8))
def test_runs_of_copies_are_independent_and_whole(wanted: list[BlockCopy]) -> None:
    runs = independent_runs(wanted)
    assert [i for start, end in runs for i in range(start, end)] == list(range(len(wanted)))
    for start, end in runs:
        written = [copy.dst_block_id for copy in wanted[start:end]]
        assert len(set(written)) == len(written)
        assert not {copy.src_block_id for copy in wanted[start:end]} & set(written)


def test_copies_from_one_block_to_many_are_one_run() -> None:
    assert independent_runs([BlockCopy(1, 2, 16), BlockCopy(1, 3, 16), BlockCopy(4, 5, 3)]) == [(0, 3)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN compares as any other value."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
