"""The CUDA kernels on a GPU: against dense attention in float64, and against themselves in other company."""

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import BlockCopy, select_kernels
from kernels.build import shared_library
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.select import cuda_backend
from kernels.cuda.variant import NAMED_VARIANTS, Variant, device_library
from kernels.reference import ReferenceKernels
from tests.kernels.cases import relative_error
from tests.kernels.cuda import rotations
from tests.kernels.cuda.rotations import each_eight_bit_variant, each_odd_value
from tests.kernels.cuda.steps import Case, Machine, Step, cases, shape_of, sharing_cases
from tests.kernels.cuda.test_attention import TOLERANCES, tolerance_of
from tests.kernels.cuda.test_linear import TOLERANCES as PRODUCT_TOLERANCES
from tests.kernels.products import Product, check_choices, check_gate, check_what_is_not_finite, greedy_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
each_variant = pytest.mark.parametrize("variant", NAMED_VARIANTS, ids=lambda variant: variant.name)
CUDA = torch.device("cuda", 0)


def place(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(CUDA)


@functools.cache
def backend() -> Backend:
    """Opens each variant once."""
    on_cuda = cuda_backend(CUDA)
    return dataclasses.replace(on_cuda, open_library=functools.cache(on_cuda.open_library))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All at once, on all cores, rather than each when it is met."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(CUDA)
        variants = set().union(*(variant.loaded for variant in NAMED_VARIANTS))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda variant: shared_library(device_library(variant, capability)), variants))


def kernels_for(case: Case) -> CudaKernels:
    return CudaKernels(CUDA, case.shape, backend(), case.tuning)


def plain_kernels(variant: Variant, num_heads: int = 1, num_kv_heads: int = 1) -> CudaKernels:
    return CudaKernels(CUDA, shape_of(variant, num_heads, num_kv_heads, 1.0), backend(), Tuning())


GPU = Machine(plain_kernels, place)


@each_variant
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_dense_attention(variant: Variant, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    step = Step(case, place)
    assert relative_error(step.run(kernels_for(case)).cpu(), step.dense()) < tolerance_of(variant)


@each_variant
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_sequence_does_not_depend_on_its_neighbours(variant: Variant, data: st.DataObject) -> None:
    case = data.draw(st.one_of(cases(variant), sharing_cases(variant)))
    step, kernels = Step(case, place), kernels_for(case)
    together = step.run(kernels)
    first = 0
    for i, (_, new) in enumerate(case.lens):
        assert torch.equal(step.alone(i).run(kernels), together[first : first + new])
        first += new


@rotations.each_variant
@settings(max_examples=20, deadline=None)
@given(case=rotations.cases, has_norms=st.booleans())
def test_rotation_equals_the_steps_one_by_one(variant: Variant, case: rotations.Case, has_norms: bool) -> None:
    rotations.check_turned(GPU, variant, case, has_norms)
    rotations.check_plain(GPU, variant, case)


@each_eight_bit_variant
def test_rounds_to_8_bits_as_torch_does(variant: Variant) -> None:
    rotations.check_rounding(GPU, variant)


@each_eight_bit_variant
@each_odd_value
def test_what_is_not_finite_makes_the_scale_so(variant: Variant, value: float) -> None:
    rotations.check_not_finite(GPU, variant, value)


def test_long_sequences_beside_short_ones() -> None:
    """Lengths that the emulation would take minutes for."""
    case = Case(Variant(torch.bfloat16, 128, 16), 2, 4, 0, [(20_000, 1), (5, 1), (3000, 700), (0, 900)], 1, 0)
    step = Step(case, place)
    found = step.run(select_kernels(CUDA, case.shape)).cpu()
    assert relative_error(found, step.dense()) < TOLERANCES[torch.bfloat16]


def test_a_captured_step_replays_with_other_lengths() -> None:
    """A launch allocates nothing of its own and waits for nothing: CUDA graphs can hold it."""
    case = Case(Variant(torch.bfloat16, 128, 16), 2, 4, 0, [(300, 1), (40, 1), (0, 1)], 1, 0)
    step, kernels = Step(case, place), kernels_for(case)
    expected = step.run(kernels)
    metadata = step.metadata()
    attention = kernels.prepare_captured(metadata, 301)
    query = torch.cat([sequence.query for sequence in step.sequences]).to(CUDA)
    attention.attend(query, step.layer, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention.attend(query, step.layer, 0)
    graph.replay()
    assert torch.equal(found, expected)

    context_lens = np.array([101, 17, 1], np.int64)
    metadata.context_lens.copy_(torch.from_numpy(context_lens))
    attention.refresh(attention.cut(context_lens, metadata.host_block_tables))
    graph.replay()
    fresh = kernels.prepare(dataclasses.replace(metadata, host_context_lens=context_lens))
    assert torch.equal(found, fresh.attend(query, step.layer, 0))


def test_copies_as_if_in_order() -> None:
    pool = torch.randint(0, 256, (3, 2, 6, 2, 16 * 64 * 2), device=CUDA, dtype=torch.uint8)
    wanted = [BlockCopy(1, 2, 5), BlockCopy(2, 3, 16), BlockCopy(3, 1, 7), BlockCopy(4, 5, 16)]
    case = Case(Variant(torch.bfloat16, 64, 16), 2, 1, 0, [(1, 1)], 1, 0)
    expected = pool.clone()
    ReferenceKernels(CUDA, case.shape).copy_blocks(expected, wanted)
    kernels_for(case).copy_blocks(pool, wanted)
    assert torch.equal(pool, expected)


@settings(max_examples=20, deadline=None)
@given(case=greedy_cases())
def test_greedy_takes_the_lowest_of_the_highest(case: tuple[torch.Tensor, set[int]]) -> None:
    logits, broken = case
    check_choices(plain_kernels(Variant(torch.float32, 64, 16)).greedy(logits.to(CUDA)).cpu(), logits, broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_inputs", [1001, 4104])
def test_products_are_right(dtype: torch.dtype, num_inputs: int) -> None:
    product = Product(7, num_inputs, 40, dtype, seed=1)
    found = product.found(plain_kernels(Variant(dtype, 64, 16)), has_bias=True, place=place)
    # cuBLAS sums in an order of its own; gates and what they open have been rounded before they meet.
    for one, right in zip(found, product.expected(has_bias=True), strict=True):
        assert relative_error(one.cpu(), right) < 3 * PRODUCT_TOLERANCES[dtype]


def test_what_is_not_finite_stays_visible() -> None:
    check_what_is_not_finite(plain_kernels(Variant(torch.bfloat16, 64, 16)), place)


@pytest.mark.parametrize("gate", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_gates_far_from_zero(gate: float) -> None:
    check_gate(plain_kernels(Variant(torch.float32, 64, 16)), torch.float32, gate, place)
