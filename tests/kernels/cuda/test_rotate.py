"""Norms, rotary embedding and KV write in one pass, emulated, against the decoder's own steps in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Angles, AttentionMetadata, HeadNorms, LayerKV
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from kernels.kv_format import LARGEST, NAN_BYTE
from tests.kernels.cases import as_held, relative_error, turned, write_plain
from tests.kernels.cuda.steps import kernels_for
from tests.kernels.guarded import guarded

EPSILON = 1e-5
NUM_BLOCKS = 6
# Pairs that fill a warp's lanes and pairs that do not.
VARIANTS = [variant for variant in NAMED_VARIANTS if not variant.has_window and not variant.has_soft_cap]
EIGHT_BIT_VARIANTS = [variant for variant in NAMED_VARIANTS if variant.kv_dtype is not None]
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-6}
# Of what float32 puts on the other side of the middle between two elements.
EIGHT_BIT_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """is_part: the heads are a part of a wider tensor."""

    num_kv_heads: int
    group_size: int
    num_tokens: int
    is_part: bool
    seed: int


class Step:
    """Tokens' heads, and a pool of NaN with a slot for each token, in no order. Every tensor is guarded."""

    def __init__(self, variant: Variant, case: Case) -> None:
        self._rng = torch.Generator().manual_seed(case.seed)
        self._dtype = variant.dtype
        num_heads = case.num_kv_heads * case.group_size
        self.kernels = kernels_for(variant, num_heads, case.num_kv_heads)
        wider = self.random(case.num_tokens, case.is_part + num_heads + 2 * case.num_kv_heads, variant.head_dim)
        self.heads = wider[:, int(case.is_part) :]
        self.slots = guarded(torch.randperm(NUM_BLOCKS * variant.block_size, generator=self._rng)[: case.num_tokens])
        self.kv_format = self.kernels.kv_format
        self.places = self.kv_format.places(self.slots)
        self.layer = LayerKV(guarded(self.blank()), guarded(self.blank()))

    def random(self, *shape: int) -> torch.Tensor:
        return guarded(torch.randn(*shape, generator=self._rng).to(self._dtype))

    def blank(self) -> torch.Tensor:
        """Keys or values of the pool, nothing of them written."""
        shape = (NUM_BLOCKS, self.kv_format.num_kv_heads, self.kv_format.head_bytes)
        return torch.full(shape, NAN_BYTE, dtype=torch.uint8)

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """What the pool holds where `keys`, [num_tokens, num_kv_heads, head_dim], alone were written."""
        plane = self.blank()
        self.kv_format.write_keys(plane, self.places, keys)
        return plane

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """As `keys`."""
        plane = self.blank()
        self.kv_format.write_values(plane, self.places, values)
        return plane

    def metadata(self) -> AttentionMetadata:
        """One sequence per token; only slot_mapping counts."""
        ones = np.ones(len(self.slots), np.int64)
        empty = torch.zeros((len(self.slots), 1), dtype=torch.int32)
        starts = torch.arange(len(ones) + 1).int()
        return AttentionMetadata(empty, empty[:, 0], starts, self.slots, empty.numpy(), ones, ones)

    def written_keys(self) -> torch.Tensor:
        """What the tokens' slots hold, [num_tokens, num_kv_heads, head_dim]; no other slot may have been written."""
        keys = self.kv_format.read_keys(self.layer.keys)[self.places]
        erased = self.layer.keys.clone()
        self.kv_format.write_keys(erased, self.places, torch.zeros_like(keys))
        assert torch.equal(erased, self.keys(torch.zeros_like(keys)))
        return keys


cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 5),
    num_tokens=st.integers(1, 20),
    is_part=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


@each_variant
@settings(max_examples=8, deadline=None)
@given(case=cases, has_norms=st.booleans())
def test_equals_the_steps_one_by_one(variant: Variant, case: Case, has_norms: bool) -> None:
    """In its slots and in no other."""
    step, tolerance = Step(variant, case), TOLERANCES[variant.dtype]
    held_tolerance = tolerance if variant.kv_dtype is None else EIGHT_BIT_TOLERANCE
    angles = Angles(*(step.random(case.num_tokens, 1, variant.head_dim // 2) for _ in range(2)))
    norms = HeadNorms(step.random(variant.head_dim), step.random(variant.head_dim), EPSILON) if has_norms else None
    found = step.kernels.prepare(step.metadata()).rotate_and_write(step.heads, angles, norms, step.layer)
    query, key, value = turned(step.heads, angles, norms, step.kernels.shape)
    assert relative_error(found, query) < tolerance
    assert relative_error(step.written_keys(), as_held(step.kv_format, key)) < held_tolerance
    assert torch.equal(step.layer.values, step.values(value.to(variant.dtype)))


@each_variant
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_an_angle_of_zero_changes_nothing(variant: Variant, case: Case) -> None:
    step = Step(variant, case)
    query = write_plain(step.kernels.prepare(step.metadata()), step.heads, step.layer)
    num_heads = (case.num_kv_heads * case.group_size, case.num_kv_heads, case.num_kv_heads)
    queries, keys, values = torch.split(step.heads, num_heads, dim=1)
    assert torch.equal(query, queries)
    assert torch.equal(step.layer.keys, step.keys(keys))
    assert torch.equal(step.layer.values, step.values(values))


@pytest.mark.parametrize("variant", EIGHT_BIT_VARIANTS, ids=lambda variant: variant.name)
def test_rounds_as_torch_does(variant: Variant) -> None:
    """Every 16-bit float of rows whose scale is 1, the middles between two elements included; and rows of zeros."""
    assert variant.kv_dtype is not None
    largest = LARGEST[variant.kv_dtype]
    floats = torch.bfloat16 if variant.dtype == torch.bfloat16 else torch.float16
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(floats)
    numbers = numbers[numbers.isfinite() & (numbers.abs() <= largest)].to(variant.dtype)
    width = variant.head_dim - 1
    numbers = numbers[: len(numbers) // width * width].view(-1, width)
    rows = torch.cat((torch.full((len(numbers), 1), largest, dtype=variant.dtype), numbers), dim=1)
    rows[::100] = 0.0
    for some in rows.split(NUM_BLOCKS * variant.block_size):
        step = Step(variant, Case(1, 1, len(some), False, 0))
        step.heads = guarded(some[:, None].expand(-1, 3, -1).contiguous())
        write_plain(step.kernels.prepare(step.metadata()), step.heads, step.layer)
        assert torch.equal(step.layer.keys, step.keys(some[:, None]))
        assert torch.equal(step.layer.values, step.values(some[:, None]))


@pytest.mark.parametrize("variant", EIGHT_BIT_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_the_scale_so(variant: Variant, value: float) -> None:
    """Of its own head's value alone."""
    step = Step(variant, Case(2, 1, 3, False, 0))
    step.heads[1, 4, 7] = value
    write_plain(step.kernels.prepare(step.metadata()), step.heads, step.layer)
    expected, kv_format = step.values(step.heads[:, 4:]), step.kv_format
    scales, expected_scales = (kv_format.scales(plane) for plane in (step.layer.values, expected))
    assert scales is not None
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert scales[step.places].isfinite().sum() == 5
    elements, expected_elements = (kv_format.values(plane).view(torch.uint8) for plane in (step.layer.values, expected))
    assert torch.equal(elements, expected_elements)
