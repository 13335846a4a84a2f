"""Norms, rotary embedding and KV write in one pass, emulated, against the decoder's own steps in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Angles, HeadNorms, LayerKV
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from tests.kernels.cases import turned
from tests.kernels.cuda.steps import relative_error
from tests.kernels.cuda.test_kv import NUM_BLOCKS, kernels_for, metadata_of
from tests.kernels.guarded import guarded

EPSILON = 1e-5
# Pairs that fill a warp's lanes and pairs that do not.
VARIANTS = [variant for variant in NAMED_VARIANTS if not variant.has_window and not variant.has_soft_cap]
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_equals_the_steps_one_by_one(
    variant: Variant, num_kv_heads: int, group_size: int, num_tokens: int, has_norms: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    num_heads, head_dim, dtype = num_kv_heads * group_size, variant.head_dim, variant.dtype

    def random(*shape: int) -> torch.Tensor:
        return guarded(torch.randn(*shape, generator=rng).to(dtype))

    heads = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = (random(num_tokens, 1, head_dim // 2) for _ in range(2))
    norms = HeadNorms(random(head_dim), random(head_dim), EPSILON) if has_norms else None
    slots = guarded(torch.randperm(NUM_BLOCKS * variant.block_size, generator=rng)[:num_tokens])
    pool = torch.full((NUM_BLOCKS, num_kv_heads, variant.block_size, head_dim), float("nan"), dtype=dtype)
    layer = LayerKV(guarded(pool), guarded(pool))

    kernels = kernels_for(variant, num_heads, num_kv_heads)
    found = kernels.prepare(metadata_of(slots)).rotate_and_write(heads, Angles(cos, sin), norms, layer)

    query, key, value = turned(heads, Angles(cos, sin), norms, kernels.shape)
    written_keys, written_values = (
        x.transpose(1, 2).reshape(-1, num_kv_heads, head_dim) for x in (layer.keys, layer.values)
    )
    assert relative_error(found, query) < TOLERANCES[dtype]
    assert relative_error(written_keys[slots], key) < TOLERANCES[dtype]
    assert torch.equal(written_values[slots].double(), value)
    unwritten = torch.ones(NUM_BLOCKS * variant.block_size, dtype=torch.bool)
    unwritten[slots] = False
    assert written_keys[unwritten].isnan().all()
    assert written_values[unwritten].isnan().all()
