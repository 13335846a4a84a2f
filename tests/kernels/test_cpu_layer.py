"""What the CPU kernels do around attention (products, norms, gates, rotation), against float64, on each target."""

import dataclasses
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Angles, AttentionShape, HeadNorms, LayerKV, Norm
from kernels.build import find_compiler
from kernels.cpu import CpuKernels
from kernels.cpu.linear import PackedLinear
from kernels.cpu.targets import AMX, AVX512_BF16, Target, library, runnable_targets
from tests.kernels.cases import Case, Step, relative_error, turned
from tests.kernels.cpu_targets import TILES, all_targets, fitting_dtype, rounds_rows, targets, used_targets
from tests.kernels.guarded import guarded
from tests.kernels.products import EPSILON, Product, check_choices, check_gate, check_what_is_not_finite, greedy_cases

pytestmark = pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def multiplying(dtype: torch.dtype, target: Target | None = None) -> CpuKernels:
    """Kernels that attend to nothing."""
    return CpuKernels(AttentionShape(4, 2, 8, 16, 0.5, dtype, dtype), target)


dtypes = st.sampled_from(list(TOLERANCES))
# Widths around whole vectors and panels; rows around whole tiles, and more than are converted at once.
widths = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 257]))
row_counts = st.one_of(st.integers(1, 40), st.sampled_from([480, 481, 967]))


@all_targets
@settings(max_examples=30, deadline=None)
@given(row_counts, widths, widths, dtypes, st.booleans(), st.integers(0, 2**32 - 1))
def test_products_are_right(
    target: Target, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    dtype = fitting_dtype(target, dtype)
    product = Product(num_rows, num_inputs, num_outputs, dtype, seed)
    normed, logits, added, gated = product.found(multiplying(dtype, target), has_bias)
    assert (normed.dtype, logits.dtype, added.dtype) == (dtype, torch.float32, dtype)
    is_rounded = rounds_rows(target, dtype)
    logits_tolerance = TOLERANCES[dtype if is_rounded else torch.float32]
    tolerances = [TOLERANCES[dtype], logits_tolerance, TOLERANCES[dtype], TOLERANCES[dtype]]
    expected = product.expected(has_bias, rounds_rows=is_rounded)
    for found, right, tolerance in zip((normed, logits, added, gated), expected, tolerances, strict=True):
        assert relative_error(found, right) < tolerance


@all_targets
@settings(max_examples=30, deadline=None)
@given(row_counts, widths, widths, dtypes, st.data())
def test_a_row_is_the_same_alone_and_in_any_batch(
    target: Target, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Bit for bit: greedy ids can't depend on who else is in the step."""
    dtype = fitting_dtype(target, dtype)
    product = Product(num_rows, num_inputs, num_outputs, dtype, seed=num_rows)
    start = data.draw(st.integers(0, num_rows - 1))
    some = slice(start, start + data.draw(st.sampled_from([1, 1, 2, 5, 13])))
    kernels = multiplying(dtype, target)
    for whole, part in zip(product.found(kernels, True), product.found(kernels, True, some), strict=True):
        assert torch.equal(whole[some], part)


@used_targets
@pytest.mark.parametrize("size", [1e-36, 1e-38])
@pytest.mark.parametrize("num_some", [1, 4, 8, 10])
def test_weights_near_zero_are_the_same_to_few_rows_and_to_many(target: Target, size: float, num_some: int) -> None:
    """Bit for bit: units for bfloat16 take what is no normal number for 0, so vectors must."""
    product = Product(20, 96, 40, torch.bfloat16, seed=0)
    for tensor in (product.weight, product.gate_up, product.total):
        tensor *= size
    kernels = multiplying(torch.bfloat16, target)
    some = slice(3, 3 + num_some)
    for whole, part in zip(product.found(kernels, False), product.found(kernels, False, some), strict=True):
        assert torch.equal(whole[some], part)


@all_targets
@settings(max_examples=30, deadline=None)
@given(row_counts, widths, st.one_of(widths, st.just(9000)), dtypes, st.booleans(), st.data())
def test_what_is_chosen_while_it_is_computed_is_the_likeliest(
    target: Target,
    num_rows: int,
    num_inputs: int,
    vocab_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    data: st.DataObject,
) -> None:
    """Bit for bit as if logits had been written down. Many tokens are alike, so that many logits are equal."""
    dtype = fitting_dtype(target, dtype)
    product = Product(num_rows, num_inputs, vocab_size, dtype, seed=num_rows)
    num_kinds = min(data.draw(st.sampled_from([1, 3, 9000])), vocab_size)
    kinds = torch.randint(num_kinds, (vocab_size,), generator=torch.Generator().manual_seed(vocab_size))
    kernels = multiplying(dtype, target)
    bias = product.bias[kinds]
    if data.draw(st.booleans()):
        product.rows[data.draw(st.integers(0, num_rows - 1)), 0] = float("nan")
    elif data.draw(st.booleans()):
        bias[data.draw(st.integers(0, vocab_size - 1))] = float(data.draw(st.sampled_from(["nan", "inf", "-inf"])))
    linear = kernels.linear(guarded(product.weight[kinds]), guarded(bias) if has_bias else None)
    rows, norm = guarded(product.rows), Norm(guarded(product.norm.weight), EPSILON)
    check_chosen(kernels, linear, rows, norm)


sizes = st.one_of(st.sampled_from([1.0, 1e4]), st.sampled_from([0.0, 1e-37, 1e-20, 1e-3, 1e20, 1e37]))


@used_targets
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 3, 8, 11, 40]),
    widths,
    st.sampled_from([5, 300, 3000]),
    dtypes,
    sizes,
    sizes,
    st.data(),
)
def test_no_bound_hides_the_likeliest(
    target: Target,
    num_rows: int,
    num_inputs: int,
    vocab_size: int,
    dtype: torch.dtype,
    row_size: float,
    weight_size: float,
    data: st.DataObject,
) -> None:
    """Tokens that are nearly alike, rows or weights that nothing rounds; numbers that overflow or vanish when they are
    multiplied; some that make all others small.
    """
    dtype = fitting_dtype(target, dtype)
    product = Product(num_rows, num_inputs, vocab_size, dtype, seed=vocab_size)
    rows_of_ones, weights_of_ones = (product.rows, product.norm.weight), (product.weight,)
    for tensor in data.draw(st.sampled_from([(), rows_of_ones, weights_of_ones, rows_of_ones + weights_of_ones])):
        tensor.copy_(tensor.sign())
    if data.draw(st.booleans()):
        product.weight.mul_(0.02).add_(product.weight[0] * 50)
    product.norm.weight.mul_(row_size)
    product.weight.mul_(weight_size)
    for tensor in (product.norm.weight[None], product.weight):
        for _ in range(data.draw(st.sampled_from([0, 0, 1, 5]))):
            row, column = (data.draw(st.integers(0, size - 1)) for size in tensor.shape)
            tensor[row, column] = data.draw(st.sampled_from([100.0, -3e3, 1e30, 0.0, float("inf"), float("nan")]))
    kernels = multiplying(dtype, target)
    norm = Norm(guarded(product.norm.weight), EPSILON)
    check_chosen(kernels, kernels.linear(guarded(product.weight), None), guarded(product.rows), norm)


def check_chosen(kernels: CpuKernels, linear: PackedLinear, rows: torch.Tensor, norm: Norm) -> None:
    """Once where all logits are made, once where those alone are that can be the highest."""
    expected = kernels.greedy(linear.logits(rows, norm))
    for sketch in (None, linear.sketch()):
        found = linear.likeliest(rows, norm, sketch)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0] * found[1], expected[0] * expected[1])
        assert ((found[0] >= 0) & (found[0] < linear.num_outputs)).all()


@pytest.mark.skipif(AMX not in runnable_targets(), reason="no AMX here")
@settings(max_examples=30, deadline=None)
@given(row_counts, widths, widths)
def test_tiles_do_what_is_written_out(num_rows: int, num_inputs: int, num_outputs: int) -> None:
    """Bit for bit: what is tested where there are none is what runs where there are."""
    product = Product(num_rows, num_inputs, num_outputs, torch.bfloat16, seed=num_rows)
    found, expected = (product.found(multiplying(torch.bfloat16, target), True) for target in (AMX, TILES))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="not x86")
@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        (AVX512_BF16, {"linear.cpp": ["vdpbf16ps", "vpdpbusd"], "attention.cpp": ["vdpbf16ps"]}),
        (AMX, {"linear.cpp": ["tdpbf16ps", "vpdpbusd"], "attention.cpp": ["tdpbf16ps"]}),
    ],
)
def test_units_are_used_where_there_are_any(target: Target, instructions: dict[str, list[str]], tmp_path: Path) -> None:
    made = library(target, torch.bfloat16, torch.bfloat16)
    flags = [flag.replace("-O3", "-O1") for flag in made.flags if flag != "-shared"]
    for source in (path for path in made.sources if path.name in instructions):
        subprocess.run(["g++", *flags, "-S", "-o", tmp_path / "made.s", source], check=True)
        for instruction in instructions[source.name]:
            assert instruction in (tmp_path / "made.s").read_text()


def test_what_is_not_finite_stays_visible() -> None:
    check_what_is_not_finite(multiplying(torch.bfloat16))


@pytest.mark.parametrize("gate", [-100.0, -20.0, 0.0, 20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_far_from_zero(gate: float, dtype: torch.dtype) -> None:
    check_gate(multiplying(dtype), dtype, gate)


@targets
@settings(max_examples=40, deadline=None)
@given(greedy_cases())
def test_greedy_takes_the_lowest_of_the_highest(target: Target, case: tuple[torch.Tensor, set[int]]) -> None:
    logits, broken = case
    kernels = multiplying(fitting_dtype(target, torch.float32), target)
    check_choices(kernels.greedy(logits), logits, broken)


@targets
@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Case,
        num_kv_heads=st.integers(1, 3),
        group_size=st.integers(1, 4),
        head_dim=st.sampled_from([2, 8, 12, 64, 80, 96, 128, 256]),
        block_size=st.sampled_from([16, 32]),
        sliding_window=st.just(0),
        lens=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=4),
        seed=st.integers(0, 2**32 - 1),
    ),
    dtypes,
    st.booleans(),
)
def test_rotates_and_writes_its_slots_and_no_other(
    target: Target, case: Case, dtype: torch.dtype, has_norms: bool
) -> None:
    dtype = fitting_dtype(target, dtype)
    case = dataclasses.replace(case, dtype=dtype)
    step, kernels = Step(case), CpuKernels(case.shape, target)
    kv_format = kernels.kv_format
    before = step.lay_out(kv_format)
    layer = LayerKV(guarded(before.keys), guarded(before.values))
    metadata, heads = step.metadata(), step.heads()
    rng = torch.Generator().manual_seed(case.seed)
    cos, sin = (torch.randn(len(heads), 1, case.head_dim // 2, generator=rng).to(dtype) for _ in range(2))
    weights = (guarded(torch.randn(case.head_dim, generator=rng).to(dtype)) for _ in range(2))
    angles, norms = Angles(guarded(cos), guarded(sin)), HeadNorms(*weights, EPSILON) if has_norms else None
    query = kernels.prepare(metadata).rotate_and_write(guarded(heads), angles, norms, layer)

    expected_query, key, value = turned(heads, angles, norms, case.shape)
    places = kv_format.places(metadata.slot_mapping)
    keys, values = kv_format.read_keys(layer.keys), kv_format.read_values(layer.values)
    assert relative_error(query, expected_query) < TOLERANCES[dtype]
    assert relative_error(keys[places], key) < TOLERANCES[dtype]
    assert torch.equal(values[places].double(), value)
    for found, expected in ((keys, kv_format.read_keys(before.keys)), (values, kv_format.read_values(before.values))):
        found[places] = expected[places]
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
