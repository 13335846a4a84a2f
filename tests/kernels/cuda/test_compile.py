"""The named variants through nvcc: they compile, and no register is spilled to memory."""

import pytest

from kernels import build
from kernels.cuda.variant import BLOCK_SIZES, EIGHT_BIT_ELEMENTS, ELEMENTS, HEAD_DIMS, NAMED_VARIANTS, NVCC
from tests.kernels.cuda.compile_variants import NAMED_JOBS, compile_all


def test_named_variants_have_one_of_each() -> None:
    assert len(NAMED_VARIANTS) == 16
    assert {variant.dtype for variant in NAMED_VARIANTS} == set(ELEMENTS)
    assert {variant.kv_dtype for variant in NAMED_VARIANTS} == {None, *EIGHT_BIT_ELEMENTS}
    assert {variant.head_dim for variant in NAMED_VARIANTS} == set(HEAD_DIMS)
    assert {variant.block_size for variant in NAMED_VARIANTS} == set(BLOCK_SIZES)
    assert {(variant.has_window, variant.has_soft_cap) for variant in NAMED_VARIANTS} == {
        (window, cap) for window in (False, True) for cap in (False, True)
    }


@pytest.mark.skipif(build.find_compiler(NVCC) is None, reason="no nvcc")
def test_named_variants_compile_without_spills() -> None:
    errors = {name: error for name, error in compile_all(NAMED_JOBS) if error is not None}
    assert not errors
