"""What the CUDA kernels do around matrix products, and the choice of tokens: emulated, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.attention import Backend, CudaKernels
from kernels.cuda.variant import Variant
from tests.kernels.cases import relative_error
from tests.kernels.cuda.backends import each_backend
from tests.kernels.cuda.steps import kernels_for
from tests.kernels.guarded import guarded
from tests.kernels.products import Product, check_choices, check_gate, check_what_is_not_finite, greedy_cases

TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}
VARIANTS = {
    torch.bfloat16: Variant(torch.bfloat16, 128, 16),
    torch.float16: Variant(torch.float16, 80, 32, kv_dtype=torch.int8),
    torch.float32: Variant(torch.float32, 64, 16),
}

dtypes = st.sampled_from(list(TOLERANCES))
seeds = st.integers(0, 2**32 - 1)
# Rows of whole chunks and others; shorter than a block's threads, and longer.
widths = st.one_of(st.integers(1, 40), st.sampled_from([256, 1000, 1001, 4104]))
# In a row of logits: anywhere, and where the first and the last threads look.
places = st.one_of(st.integers(0, 4098), st.sampled_from([0, 2047, 4095]))


def kernels_of(backend: Backend, dtype: torch.dtype, order_seed: int) -> CudaKernels:
    kernels = kernels_for(backend, VARIANTS[dtype], 2, 1)
    kernels.library(has_window=False).seed_emulation(order_seed)
    return kernels


@each_backend
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), widths, st.integers(16, 40), dtypes, st.booleans(), seeds)
def test_products_are_right(
    backend: Backend, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    product = Product(num_rows, num_inputs, num_outputs, dtype, seed)
    normed, logits, added, gated = product.found(kernels_of(backend, dtype, seed), has_bias)
    assert (normed.dtype, logits.dtype, added.dtype) == (dtype, torch.float32, dtype)
    *expected, right_gated = product.expected(has_bias)
    for found, right in zip((normed, logits, added), expected, strict=True):
        assert relative_error(found, right) < TOLERANCES[dtype]
    # Gates and what they open have been rounded before they meet.
    assert relative_error(gated, right_gated) < 3 * TOLERANCES[dtype]


@each_backend
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), widths, dtypes, seeds)
def test_norms_and_gates_are_rounded_once(
    backend: Backend, num_rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    """And each row's are the same, bit for bit, alone: matrices are unit matrices, so that a norm opens itself."""
    product = Product(num_rows, size, size, dtype, seed)
    product.weight.copy_(torch.eye(size))
    product.gate_up.copy_(torch.eye(size).repeat(2, 1))
    normed, _, _, gated = product.found(kernels_of(backend, dtype, seed), has_bias=False)
    right_normed, _, _, _ = product.expected(has_bias=False)
    for found, right in ((normed, right_normed), (gated, F.silu(normed.double()) * normed.double())):
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), right, rtol=half_ulp + 1e-6, atol=torch.finfo(dtype).tiny)

    row = slice(seed % num_rows, seed % num_rows + 1)
    alone = product.found(kernels_of(backend, dtype, seed + 1), has_bias=False, some=row)
    assert torch.equal(alone[0], normed[row])
    assert torch.equal(alone[3], gated[row])


@each_backend
def test_what_is_not_finite_stays_visible(backend: Backend) -> None:
    check_what_is_not_finite(kernels_of(backend, torch.bfloat16, 1))


@each_backend
@pytest.mark.parametrize("gate", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_gates_far_from_zero(backend: Backend, gate: float) -> None:
    check_gate(kernels_of(backend, torch.float32, 0), torch.float32, gate)


@each_backend
@settings(max_examples=60, deadline=None)
@given(greedy_cases(), seeds)
def test_greedy_takes_the_lowest_of_the_highest(
    backend: Backend, case: tuple[torch.Tensor, set[int]], order_seed: int
) -> None:
    logits, broken = case
    check_choices(kernels_of(backend, torch.float32, order_seed).greedy(logits), logits, broken)


@each_backend
@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2052, 4099]), st.lists(places, min_size=1, max_size=4), seeds)
def test_greedy_looks_at_all_of_a_long_row(backend: Backend, vocab_size: int, highest: list[int], seed: int) -> None:
    """Equal highest logits in several threads' shares; the row after it has one that is not finite."""
    logits = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[0, [place % vocab_size for place in highest]] = 9.0
    logits[1, highest[0] % vocab_size] = float("-inf")
    check_choices(kernels_of(backend, torch.float32, seed).greedy(guarded(logits)), logits, {1})


@each_backend
def test_a_row_of_nothing_but_nan_has_an_id(backend: Backend) -> None:
    logits = guarded(torch.full((2, 13), float("nan")))
    check_choices(kernels_of(backend, torch.float32, 5).greedy(logits), logits, {0, 1})
