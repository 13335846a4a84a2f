"""What runs the CUDA kernels where there is no GPU: an emulation of their source, or of the PTX that nvcc makes."""

import functools
from collections.abc import Sequence

import pytest
import torch

from kernels import build
from kernels.cuda.attention import Backend
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import NAMED_VARIANTS, NVCC, Variant, emulated_library
from tests.kernels.cuda.ptx.library import open_ptx


@functools.cache
def open_emulated(variant: Variant) -> KernelLibrary:
    """The variant's source on this CPU."""
    return KernelLibrary(build.shared_library(emulated_library(variant)))


EMULATION = Backend(open_emulated, lambda: 0)
PTX = Backend(open_ptx, lambda: 0)

needs_nvcc = pytest.mark.skipif(build.find_compiler(NVCC) is None, reason="no nvcc")
# Those whose PTX each run of the tests tries: float32, 16 bits, 8 bits; the others' are tried by `make test-all`.
PTX_VARIANTS = (
    Variant(torch.bfloat16, 128, 16),
    Variant(torch.float16, 80, 32, has_window=True, kv_dtype=torch.int8),
    Variant(torch.float32, 64, 16),
)

each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(EMULATION, id="emulated"), pytest.param(PTX, id="ptx", marks=needs_nvcc)]
)


def each(variants: Sequence[Variant] = NAMED_VARIANTS) -> pytest.MarkDecorator:
    """Each variant on each back end."""
    emulated = [pytest.param(variant, EMULATION, id=variant.name) for variant in variants]
    compiled = [
        pytest.param(variant, PTX, id=f"{variant.name}-ptx", marks=[needs_nvcc, *_marks(variant)])
        for variant in variants
    ]
    return pytest.mark.parametrize(("variant", "backend"), [*emulated, *compiled])


def _marks(variant: Variant) -> list[pytest.MarkDecorator]:
    return [] if variant in PTX_VARIANTS else [pytest.mark.slow]
