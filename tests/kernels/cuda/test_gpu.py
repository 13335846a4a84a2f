"""The CUDA kernels on a GPU: against dense attention in float64, and against themselves in other company."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import BlockCopy, select_kernels
from kernels.cuda.attention import CudaKernels
from kernels.cuda.select import cuda_backend
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from kernels.reference import ReferenceKernels
from tests.kernels.cases import relative_error
from tests.kernels.cuda.steps import Case, Step, cases, sharing_cases
from tests.kernels.cuda.test_attention import TOLERANCES, tolerance_of
from tests.kernels.cuda.test_linear import TOLERANCES as PRODUCT_TOLERANCES
from tests.kernels.products import Product, check_choices, greedy_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
each_variant = pytest.mark.parametrize("variant", NAMED_VARIANTS, ids=lambda variant: variant.name)
CUDA = torch.device("cuda", 0)


def place(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(CUDA)


def kernels_for(case: Case) -> CudaKernels:
    return CudaKernels(CUDA, case.shape, cuda_backend(CUDA), case.tuning)


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
    found = kernels_for(Case(Variant(torch.float32, 64, 16), 1, 1, 0, [(1, 1)], 1, 0)).greedy(logits.to(CUDA))
    check_choices(found.cpu(), logits, broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_inputs", [1001, 4104])
def test_products_are_right(dtype: torch.dtype, num_inputs: int) -> None:
    product = Product(7, num_inputs, 40, dtype, seed=1)
    kernels = kernels_for(Case(Variant(dtype, 64, 16), 1, 1, 0, [(1, 1)], 1, 0))
    found = product.found(kernels, has_bias=True, place=place)
    for one, right in zip(found, product.expected(has_bias=True), strict=True):
        assert relative_error(one.cpu(), right) < PRODUCT_TOLERANCES[dtype]
