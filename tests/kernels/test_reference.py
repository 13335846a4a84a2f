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
from kernels.kv_format import NAN_BYTE, KVFormat
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


@settings(max_examples=20, deadline=None)
@given(cases, st.sampled_from([0.5, 2.0, 50.0]))
def test_scores_are_capped(case: Case, soft_cap: float) -> None:
    case = dataclasses.replace(case, soft_cap=soft_cap)
    step = Step(case)
    found = step.run(reference(case.shape))
    torch.testing.assert_close(found.double(), step.dense(), atol=3e-6, rtol=3e-5)


@settings(max_examples=15, deadline=None)
@given(cases, st.sampled_from([torch.bfloat16, torch.float16]))
def test_sums_are_float32(case: Case, dtype: torch.dtype) -> None:
    """Half precision loses what rounding the inputs and the output loses, and no more."""
    case = dataclasses.replace(case, dtype=dtype)
    step = Step(case)
    found = step.run(reference(case.shape))
    torch.testing.assert_close(found, step.dense().to(dtype), atol=2e-3, rtol=2 * torch.finfo(dtype).eps)


@settings(max_examples=20, deadline=None)
@given(cases, st.sampled_from([torch.float8_e4m3fn, torch.int8]))
def test_attends_to_8_bit_kv_as_the_pool_holds_it(case: Case, kv_dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, kv_dtype=kv_dtype)
    step = Step(case)
    found = step.run(reference(case.shape))
    torch.testing.assert_close(found.double(), step.dense(), atol=3e-6, rtol=3e-5)


@settings(max_examples=20, deadline=None)
@given(cases, st.sampled_from([None, torch.int8]))
def test_writes_its_slots_and_no_other(case: Case, kv_dtype: torch.dtype | None) -> None:
    case = dataclasses.replace(case, kv_dtype=kv_dtype)
    step, kernels_ = Step(case), reference(case.shape)
    step.run(kernels_)
    before, kv_format = step.lay_out(kernels_.kv_format), kernels_.kv_format
    places = kv_format.places(step.metadata().slot_mapping)
    for written, unwritten, read in (
        (step.layer.keys, before.keys, kv_format.read_keys),
        (step.layer.values, before.values, kv_format.read_values),
    ):
        assert read(written)[places].isfinite().all()
        rows, rows_before = read(written), read(unwritten)
        rows[places] = rows_before[places]
        torch.testing.assert_close(rows, rows_before, rtol=0, atol=0, equal_nan=True)


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


def test_where_keys_and_values_lie_in_a_block() -> None:
    """Pairs of dimensions, token by token; pairs of tokens, dimension by dimension."""
    kv_format = KVFormat(torch.float32, 1, 4, 16, key_group=2, value_group=2)
    rows = torch.arange(64.0).view(16, 4)  # token 0 is 0, 1, 2, 3
    keys, values = (torch.zeros(kv_format.head_bytes, dtype=torch.uint8) for _ in range(2))
    kv_format.write_keys(keys, (), rows)
    kv_format.write_values(values, (), rows)
    assert keys.view(torch.float32)[:6].tolist() == [0, 1, 4, 5, 8, 9]
    assert keys.view(torch.float32)[32:36].tolist() == [2, 3, 6, 7]
    assert values.view(torch.float32)[:10].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("key_group", "value_group"), [(1, 1), (2, 2), (4, 1)])
def test_copies_run_in_order_and_copy_no_more_than_asked(
    kv_dtype: torch.dtype, key_group: int, value_group: int
) -> None:
    kv_format = KVFormat(kv_dtype, 1, 4, 16, key_group, value_group)
    shape = AttentionShape(1, 1, 4, 16, 0.5, torch.float32, kv_dtype)
    kernels_ = ReferenceKernels(torch.device("cpu"), shape, kv_format)
    pool = torch.full((2, 2, 5, 1, kv_format.head_bytes), NAN_BYTE, dtype=torch.uint8)
    for layer in pool:
        kv_format.write_keys(layer[0, 1], (), torch.randn(1, 16, 4))
        kv_format.write_values(layer[1, 1], (), torch.randn(1, 16, 4))
    kernels_.copy_blocks(pool, [BlockCopy(1, 2, 5), BlockCopy(2, 3, 3)])
    for layer in pool:
        for rows in (kv_format.read_keys(layer[0]), kv_format.read_values(layer[1])):
            assert rows[1].isfinite().all()
            assert torch.equal(rows[2, :, :5], rows[1, :, :5])
            assert torch.equal(rows[3, :, :3], rows[1, :, :3])
            assert rows[2, :, 5:].isnan().all()
            assert rows[3, :, 3:].isnan().all()
            assert rows[4].isnan().all()


@pytest.mark.gpu
@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_cuda_equals_dense_attention(case: Case, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = dataclasses.replace(case, dtype=dtype)
    step = Step(case)
    found = step.run(select_kernels(torch.device("cuda"), case.shape), "cuda")
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 3e-5
    # Weights are rounded to bfloat16: where few tokens are seen, errors do not cancel.
    atol = 5e-3 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(found, step.dense().to(dtype), atol=atol, rtol=tolerance)
