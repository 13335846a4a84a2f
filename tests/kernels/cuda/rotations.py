"""Heads to turn and to write, and what should come of them: norms, rotary embedding and KV write in one pass, against
the decoder's own steps in float64.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kernels import Angles, AttentionMetadata, HeadNorms, LayerKV
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from kernels.kv_format import LARGEST, NAN_BYTE
from tests.kernels.cases import as_held, relative_error, turned, write_plain
from tests.kernels.cuda.steps import Machine

EPSILON = 1e-5
NUM_BLOCKS = 6
# Pairs that fill a warp's lanes and pairs that do not.
VARIANTS = [variant for variant in NAMED_VARIANTS if not variant.has_window and not variant.has_soft_cap]
EIGHT_BIT_VARIANTS = [variant for variant in NAMED_VARIANTS if variant.kv_dtype is not None]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
each_eight_bit_variant = pytest.mark.parametrize("variant", EIGHT_BIT_VARIANTS, ids=lambda variant: variant.name)
each_odd_value = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
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


cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 5),
    num_tokens=st.integers(1, 20),
    is_part=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


class Step:
    """Tokens' heads, and a pool of NaN with a slot for each token, in no order; everything on `machine`."""

    def __init__(self, machine: Machine, variant: Variant, case: Case) -> None:
        self._rng = torch.Generator().manual_seed(case.seed)
        self._dtype, self._place = variant.dtype, machine.place
        num_heads = case.num_kv_heads * case.group_size
        self.kernels = machine.kernels_for(variant, num_heads, case.num_kv_heads)
        wider = self.random(case.num_tokens, case.is_part + num_heads + 2 * case.num_kv_heads, variant.head_dim)
        self.heads = wider[:, int(case.is_part) :]
        self.slots = torch.randperm(NUM_BLOCKS * variant.block_size, generator=self._rng)[: case.num_tokens]
        self.kv_format = self.kernels.kv_format
        self.places = self.kv_format.places(self.slots)
        self._layer = LayerKV(self._place(self.blank()), self._place(self.blank()))

    def random(self, *shape: int) -> torch.Tensor:
        return self._place(torch.randn(*shape, generator=self._rng).to(self._dtype))

    def blank(self) -> torch.Tensor:
        """Keys or values of the pool, nothing of them written."""
        shape = (NUM_BLOCKS, self.kv_format.num_kv_heads, self.kv_format.head_bytes)
        return torch.full(shape, NAN_BYTE, dtype=torch.uint8)

    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """What the pool holds where `keys`, [num_tokens, num_kv_heads, head_dim], alone were written."""
        plane = self.blank()
        self.kv_format.write_keys(plane, self.places, keys.cpu())
        return plane

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """As `keys`."""
        plane = self.blank()
        self.kv_format.write_values(plane, self.places, values.cpu())
        return plane

    def run(self, angles: Angles, norms: HeadNorms | None) -> torch.Tensor:
        """Turns and writes; returns the queries."""
        step = self.kernels.prepare(self._metadata())
        return step.rotate_and_write(self.heads, angles, norms, self._layer).cpu()

    def run_plain(self) -> torch.Tensor:
        """The same, all angles being 0."""
        return write_plain(self.kernels.prepare(self._metadata()), self.heads, self._layer).cpu()

    @property
    def layer(self) -> LayerKV:
        """A copy of the pool."""
        return LayerKV(self._layer.keys.cpu(), self._layer.values.cpu())

    def written_keys(self) -> torch.Tensor:
        """What the tokens' slots hold, [num_tokens, num_kv_heads, head_dim]; no other slot may have been written."""
        plane = self.layer.keys
        keys = self.kv_format.read_keys(plane)[self.places]
        erased = plane.clone()
        self.kv_format.write_keys(erased, self.places, torch.zeros_like(keys))
        assert torch.equal(erased, self.keys(torch.zeros_like(keys)))
        return keys

    def _metadata(self) -> AttentionMetadata:
        """One sequence per token; only slot_mapping counts."""
        ones = np.ones(len(self.slots), np.int64)
        empty = torch.zeros((len(self.slots), 1), dtype=torch.int32)
        starts = torch.arange(len(ones) + 1).int()
        on_device = [self._place(tensor) for tensor in (empty, empty[:, 0], starts, self.slots)]
        return AttentionMetadata(*on_device, empty.numpy(), ones, ones)


def check_turned(machine: Machine, variant: Variant, case: Case, has_norms: bool) -> None:
    """Queries are right; keys and values, too, in their slots and in no other."""
    step, tolerance = Step(machine, variant, case), TOLERANCES[variant.dtype]
    held_tolerance = tolerance if variant.kv_dtype is None else EIGHT_BIT_TOLERANCE
    angles = Angles(*(step.random(case.num_tokens, 1, variant.head_dim // 2) for _ in range(2)))
    norms = HeadNorms(step.random(variant.head_dim), step.random(variant.head_dim), EPSILON) if has_norms else None
    found = step.run(angles, norms)
    query, key, value = (x.cpu() for x in turned(step.heads, angles, norms, step.kernels.shape))
    assert relative_error(found, query) < tolerance
    assert relative_error(step.written_keys(), as_held(step.kv_format, key)) < held_tolerance
    assert torch.equal(step.layer.values, step.values(value.to(variant.dtype)))


def check_plain(machine: Machine, variant: Variant, case: Case) -> None:
    """An angle of zero changes nothing."""
    step = Step(machine, variant, case)
    query = step.run_plain()
    num_heads = (case.num_kv_heads * case.group_size, case.num_kv_heads, case.num_kv_heads)
    queries, keys, values = torch.split(step.heads, num_heads, dim=1)
    assert torch.equal(query, queries.cpu())
    assert torch.equal(step.layer.keys, step.keys(keys))
    assert torch.equal(step.layer.values, step.values(values))


def check_rounding(machine: Machine, variant: Variant) -> None:
    """As torch's: every 16-bit float of rows whose scale is 1, the middles between two elements included; and rows of
    zeros. variant: one of EIGHT_BIT_VARIANTS.
    """
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
        step = Step(machine, variant, Case(1, 1, len(some), False, 0))
        step.heads = machine.place(some[:, None].expand(-1, 3, -1).contiguous())
        step.run_plain()
        assert torch.equal(step.layer.keys, step.keys(some[:, None]))
        assert torch.equal(step.layer.values, step.values(some[:, None]))


def check_not_finite(machine: Machine, variant: Variant, value: float) -> None:
    """It makes the scale of its own head's value so, and no other. variant: one of EIGHT_BIT_VARIANTS."""
    step = Step(machine, variant, Case(2, 1, 3, False, 0))
    step.heads[1, 4, 7] = value
    step.run_plain()
    found, expected, kv_format = step.layer.values, step.values(step.heads[:, 4:]), step.kv_format
    scales, expected_scales = (kv_format.scales(plane) for plane in (found, expected))
    assert scales is not None
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert scales[step.places].isfinite().sum() == 5
    elements, expected_elements = (kv_format.values(plane).view(torch.uint8) for plane in (found, expected))
    assert torch.equal(elements, expected_elements)
