"""A step's layers in one native call, against the same operations one by one, and against the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Angles, HeadNorms, Kernels, Layer, Norm
from kernels.build import find_compiler
from kernels.cpu import CpuKernels
from kernels.cpu.targets import Target
from kernels.layers import UnfusedStep
from kernels.reference import ReferenceKernels
from tests.kernels.cases import Case, Step, relative_error
from tests.kernels.cpu_targets import fitting_dtype, targets

pytestmark = pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
HIDDEN_SIZE, INNER_SIZE, EPSILON = 48, 72, 1e-5

# Full attention and two windows, by layer.
WINDOWS = (0, 20, 0, 5)


class Model:
    """Layers of random weights, and a step for them: every layer begins with the KV of the case."""

    def __init__(self, case: Case, has_norms: bool) -> None:
        self._rng = torch.Generator().manual_seed(case.seed)
        self.case, self.dtype, self.has_norms = case, case.dtype, has_norms
        self.kv_dtype = case.shape.kv_dtype
        self.step = Step(case)
        self.num_tokens = sum(new for _, new in case.lens)
        heads = case.shape.num_heads
        self.sizes = {
            "qkv": (heads + 2 * case.num_kv_heads, HIDDEN_SIZE, case.head_dim),
            "o": (1, heads * case.head_dim, HIDDEN_SIZE),
            "gate_up": (2, HIDDEN_SIZE, INNER_SIZE),
            "down": (1, INNER_SIZE, HIDDEN_SIZE),
        }
        self.weights = [
            {name: self.random(parts * out, num_in) / num_in**0.5 for name, (parts, num_in, out) in self.sizes.items()}
            | {name + "_bias": self.random(parts * out) for name, (parts, _, out) in self.sizes.items()}
            | {"input_norm": self.random(HIDDEN_SIZE), "post_norm": self.random(HIDDEN_SIZE)}
            | {"query": self.random(case.head_dim), "key": self.random(case.head_dim)}
            for _ in WINDOWS
        ]
        self.hidden = self.random(self.num_tokens, HIDDEN_SIZE)
        angles = torch.randn(self.num_tokens, 1, case.head_dim // 2, generator=self._rng)
        self.angles = Angles(angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        self.rows: torch.Tensor | None = None  # of the outputs

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._rng).to(self.dtype)

    def layers(self, kernels: Kernels) -> list[Layer]:
        return [
            Layer(
                input_norm=Norm(weights["input_norm"], EPSILON),
                head_norms=HeadNorms(weights["query"], weights["key"], EPSILON) if self.has_norms else None,
                post_norm=Norm(weights["post_norm"], EPSILON),
                sliding_window=window,
                gate_up=kernels.gated(weights["gate_up"], weights["gate_up_bias"]),
                **{name: kernels.linear(weights[name], weights[name + "_bias"]) for name in ("qkv", "o", "down")},
            )
            for weights, window in zip(self.weights, WINDOWS, strict=True)
        ]

    def run(self, kernels: Kernels, is_one_call: bool) -> list[torch.Tensor]:
        """Hidden states and the KV of all layers."""
        kv_format = kernels.kv_format
        kv = [self.step.lay_out(kv_format) for _ in WINDOWS]
        hidden, layers, step = self.hidden.clone(), self.layers(kernels), kernels.prepare(self.step.metadata())
        if is_one_call:
            hidden = step.run_layers(layers, kv, hidden, self.angles, self.rows)
        else:
            hidden = UnfusedStep.run_layers(step, layers, kv, hidden, self.angles, self.rows)
        blocks = [x for layer in kv for x in (kv_format.read_keys(layer.keys), kv_format.read_values(layer.values))]
        return [hidden, *(x.nan_to_num(7.0) for x in blocks)]


# Of activations, and of the pool.
DTYPES = [*((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)), (torch.bfloat16, torch.int8)]


def make(case: Case, dtypes: tuple[torch.dtype, torch.dtype], has_norms: bool) -> Model:
    return Model(replace(case, dtype=dtypes[0], kv_dtype=dtypes[1]), has_norms)


models = st.builds(
    make,
    st.builds(
        Case,
        num_kv_heads=st.integers(1, 2),
        group_size=st.integers(1, 3),
        head_dim=st.sampled_from([8, 16, 80]),
        block_size=st.sampled_from([16, 32]),
        sliding_window=st.just(0),
        lens=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 7])), min_size=1, max_size=4),
        seed=st.integers(0, 2**32 - 1),
    ),
    st.sampled_from(DTYPES),
    st.booleans(),
)


@targets
@settings(max_examples=12, deadline=None)
@given(models)
def test_one_call_is_the_same_as_many(target: Target, model: Model) -> None:
    model = make(
        model.case, (fitting_dtype(target, model.dtype), fitting_dtype(target, model.kv_dtype)), model.has_norms
    )
    kernels = CpuKernels(model.case.shape, target)
    for one, many in zip(model.run(kernels, True), model.run(kernels, False), strict=True):
        assert torch.equal(one, many)


@settings(max_examples=24, deadline=None)
@given(models, st.data())
def test_the_last_layer_makes_rows_of_the_same_whichever_are_asked_for(model: Model, data: st.DataObject) -> None:
    """Bit for bit; some twice, as forks of one prompt ask for them, or none; keys and values are all there."""
    kernels = CpuKernels(model.case.shape)
    expected, *expected_kv = model.run(kernels, True)
    model.rows = torch.tensor(data.draw(st.lists(st.integers(0, model.num_tokens - 1), max_size=20)), dtype=torch.int64)
    for is_one_call in (True, False):
        found, *found_kv = model.run(kernels, is_one_call)
        assert torch.equal(found, expected[model.rows])
        assert all(map(torch.equal, found_kv, expected_kv))


@settings(max_examples=12, deadline=None)
@given(models)
def test_layers_are_those_of_the_reference(model: Model) -> None:
    found = model.run(CpuKernels(model.case.shape), True)
    expected = model.run(ReferenceKernels(torch.device("cpu"), model.case.shape), True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[model.dtype]
    if model.case.kv_dtype is not None:
        tolerance = max(tolerance, 1e-2)  # of 8 bits: what is rounded the other way is off by a whole step
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


def test_other_layers_are_laid_out_anew() -> None:
    """The same kernels, asked to run another model, or into another pool."""
    case = Case(1, 2, 8, 16, 0, [(5, 1), (0, 3)], seed=3)
    kernels = CpuKernels(case.shape)
    first, second = (Model(case, has_norms) for has_norms in (True, False))
    expected = [model.run(CpuKernels(case.shape), True)[0] for model in (first, second)]
    assert torch.equal(first.run(kernels, True)[0], expected[0])
    assert torch.equal(second.run(kernels, True)[0], expected[1])
    assert torch.equal(first.run(kernels, True)[0], expected[0])
