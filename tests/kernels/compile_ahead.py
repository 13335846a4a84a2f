"""`python -m tests.kernels.compile_ahead`: what the tests of this folder load, compiled at the lowest priority.

Started with a whole run of the tests: those that come before these wait for processes more than they compute.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from kernels.build import BuildError, Library, find_compiler, shared_library
from kernels.cpu.targets import AMX, AVX512_BF16, library, runnable_targets
from kernels.cuda.variant import NAMED_VARIANTS, NVCC, emulated_library
from tests.kernels.cpu_targets import DTYPES, TILES, USED, WRITTEN_OUT, fitting_dtype
from tests.kernels.cuda.backends import PTX_VARIANTS
from tests.kernels.cuda.compile_variants import NAMED_JOBS, compile_all
from tests.kernels.cuda.ptx.library import library_of, ptx_of

LOWEST_PRIORITY = 19


def libraries() -> Iterator[Library]:
    """Those made by g++, in about the order of their use. Some come twice."""
    for target in (*runnable_targets(), *WRITTEN_OUT):
        for dtype, kv_dtype in DTYPES:
            yield library(target, fitting_dtype(target, dtype), fitting_dtype(target, kv_dtype))
    for variant in NAMED_VARIANTS:
        yield from map(emulated_library, variant.loaded)


def translated_libraries() -> Iterator[Library]:
    """Those made from nvcc's PTX; none without nvcc."""
    if find_compiler(NVCC) is None:
        return
    for variant in PTX_VARIANTS:
        for one in variant.loaded:
            yield library_of(one, ptx_of(one))


def single_libraries() -> Iterator[Library]:
    """Each of one test alone."""
    yield library(USED[0], torch.float32, torch.float32, has_soft_cap=True)
    yield library(TILES, torch.bfloat16, torch.bfloat16, has_soft_cap=True)
    for target in (AMX, AVX512_BF16):
        yield library(target, torch.bfloat16, torch.bfloat16)
    yield library(USED[0], torch.float32, torch.int8)


def main() -> None:
    """What can't be compiled is left to the tests."""
    os.nice(LOWEST_PRIORITY)
    _compile(libraries())
    list(compile_all(NAMED_JOBS))
    _compile(translated_libraries())
    _compile(single_libraries())


def _compile(made: Iterator[Library]) -> None:
    for one in made:
        with contextlib.suppress(BuildError):
            shared_library(one)


if __name__ == "__main__":
    main()
