"""Norms, rotary embedding and KV write in one pass, emulated, against the decoder's own steps in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Angles, AttentionMetadata, HeadNorms, LayerKV
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from tests.kernels.cases import relative_error, turned, write_plain
from tests.kernels.cuda.steps import kernels_for
from tests.kernels.guarded import guarded

EPSILON = 1e-5
NUM_BLOCKS = 6
# Pairs that fill a warp's lanes and pairs that do not.
VARIANTS = [variant for variant in NAMED_VARIANTS if not variant.has_window and not variant.has_soft_cap]
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-6}


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
        shape = (NUM_BLOCKS, case.num_kv_heads, variant.block_size, variant.head_dim)
        pool = torch.full(shape, float("nan"), dtype=variant.dtype)
        self.layer = LayerKV(guarded(pool), guarded(pool))

    def random(self, *shape: int) -> torch.Tensor:
        return guarded(torch.randn(*shape, generator=self._rng).to(self._dtype))

    def metadata(self) -> AttentionMetadata:
        """One sequence per token; only slot_mapping counts."""
        ones = np.ones(len(self.slots), np.int64)
        empty = torch.zeros((len(self.slots), 1), dtype=torch.int32)
        starts = torch.arange(len(ones) + 1).int()
        return AttentionMetadata(empty, empty[:, 0], starts, self.slots, empty.numpy(), ones, ones)

    def written(self, pool: torch.Tensor) -> torch.Tensor:
        """What the tokens' slots hold, [num_tokens, num_kv_heads, head_dim]; no other slot may have been written."""
        by_slot = pool.transpose(1, 2).flatten(0, 1)
        others = torch.ones(len(by_slot), dtype=torch.bool)
        others[self.slots] = False
        assert by_slot[others].isnan().all()
        return by_slot[self.slots]


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
    angles = Angles(*(step.random(case.num_tokens, 1, variant.head_dim // 2) for _ in range(2)))
    norms = HeadNorms(step.random(variant.head_dim), step.random(variant.head_dim), EPSILON) if has_norms else None
    found = step.kernels.prepare(step.metadata()).rotate_and_write(step.heads, angles, norms, step.layer)
    query, key, value = turned(step.heads, angles, norms, step.kernels.shape)
    assert relative_error(found, query) < tolerance
    assert relative_error(step.written(step.layer.keys), key) < tolerance
    assert torch.equal(step.written(step.layer.values).double(), value)


@each_variant
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_an_angle_of_zero_changes_nothing(variant: Variant, case: Case) -> None:
    step = Step(variant, case)
    query = write_plain(step.kernels.prepare(step.metadata()), step.heads, step.layer)
    found = (query, step.written(step.layer.keys), step.written(step.layer.values))
    assert torch.equal(torch.cat(found, dim=1), step.heads)
