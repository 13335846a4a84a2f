"""The reference kernels against dense attention in float64, over random shapes, in a pool full of NaN."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kernels.reference
from kernels import AttentionShape, BlockCopy, select_kernels
from kernels.reference import ReferenceKernels
from tests.kernels.cases import Case, Step, cases


def reference(shape: AttentionShape) -> ReferenceKernels:
    return ReferenceKernels(torch.device("cpu"), shape)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_equals_dense_attention(case: Case) -> None:
    step = Step(case)
    found = step.run(reference(case.shape))
    torch.testing.assert_close(found.double(), step.dense(), atol=3e-6, rtol=3e-5)


@settings(max_examples=15, deadline=None)
@given(cases, st.sampled_from([torch.bfloat16, torch.float16]))
def test_sums_are_float32(case: Case, dtype: torch.dtype) -> None:
    """Half precision loses what rounding the inputs and the output loses, and no more."""
    step = Step(case, dtype)
    found = step.run(reference(case.shape))
    torch.testing.assert_close(found, step.dense().to(dtype), atol=2e-3, rtol=2 * torch.finfo(dtype).eps)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_writes_its_slots_and_no_other(case: Case) -> None:
    step = Step(case)
    keys_before = step.layer.keys.clone()
    step.run(reference(case.shape))
    slots = step.metadata().slot_mapping
    written = torch.zeros(keys_before.shape[0] * case.block_size, dtype=torch.bool)
    written[slots] = True
    by_slot = step.layer.keys.transpose(1, 2).reshape(-1, case.num_kv_heads, case.head_dim)
    before_by_slot = keys_before.transpose(1, 2).reshape(-1, case.num_kv_heads, case.head_dim)
    assert by_slot[written].isfinite().all()
    torch.testing.assert_close(by_slot[~written], before_by_slot[~written], equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_a_row_does_not_depend_on_its_neighbours(case: Case) -> None:
    """Bit for bit: how a sequence is cut, padded and summed follows from its own lengths."""
    together = Step(case).run(reference(case.shape))
    firsts = np.cumsum([0, *(new for _, new in case.lens)])
    step = Step(case)
    for i, lens in enumerate(case.lens):
        alone = Step(dataclasses.replace(case, lens=[lens]))
        alone.keys, alone.values, alone.queries = [step.keys[i]], [step.values[i]], [step.queries[i]]
        for position in range(lens[0]):
            block, slot = divmod(position, case.block_size)
            alone.layer.keys[alone.tables[0][block], :, slot] = step.keys[i][position]
            alone.layer.values[alone.tables[0][block], :, slot] = step.values[i][position]
        found = alone.run(reference(case.shape))
        assert torch.equal(found, together[firsts[i] : firsts[i + 1]])


@settings(max_examples=10, deadline=None)
@given(cases)
def test_limits_on_memory_change_nothing(case: Case) -> None:
    """Long prompts are cut and large groups split; small limits do it to small cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.reference, "MAX_QUERIES", 7)
        patch.setattr(kernels.reference, "MAX_GATHERED", 4096)
        step = Step(case)
        found = step.run(reference(case.shape))
    torch.testing.assert_close(found.double(), step.dense(), atol=3e-6, rtol=3e-5)


def test_padding_is_at_most_a_third() -> None:
    counts: NDArray[np.int64] = np.arange(1, 2000)
    rounded = kernels.reference._round_up(counts)
    assert (rounded >= counts).all()
    assert (rounded[2:] < counts[2:] * 1.5).all()
    assert len(np.unique(rounded)) <= 2 * np.log2(2000) + 1


def test_copies_run_in_order_and_copy_no_more_than_asked() -> None:
    pool = torch.full((2, 2, 5, 1, 16, 4), float("nan"))
    pool[:, :, 1] = torch.randn(2, 2, 1, 16, 4)
    shape = AttentionShape(1, 1, 4, 16, 0.5)
    reference(shape).copy_blocks(pool, [BlockCopy(1, 2, 5), BlockCopy(2, 3, 3)])
    assert torch.equal(pool[:, :, 2, :, :5], pool[:, :, 1, :, :5])
    assert torch.equal(pool[:, :, 3, :, :3], pool[:, :, 1, :, :3])
    assert pool[:, :, 2, :, 5:].isnan().all()
    assert pool[:, :, 3, :, 3:].isnan().all()
    assert pool[:, :, 4].isnan().all()


@pytest.mark.gpu
@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_cuda_equals_dense_attention(case: Case, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    step = Step(case, dtype, "cuda")
    found = step.run(select_kernels(torch.device("cuda"), case.shape), "cuda")
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 3e-5
    torch.testing.assert_close(found, step.dense().to(dtype), atol=2e-3, rtol=tolerance)
