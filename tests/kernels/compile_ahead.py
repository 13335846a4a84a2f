"""`python -m tests.kernels.compile_ahead`: what the tests of this folder load, compiled at the lowest priority.

Started with a whole run of the tests: those that come before these wait for processes more than they compute.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from kernels.build import BuildError, Library, shared_library
from kernels.cpu.targets import library, runnable_targets
from kernels.cuda.variant import NAMED_VARIANTS, emulated_library
from tests.kernels.cpu_targets import DTYPES, WRITTEN_OUT, fitting_dtype
from tests.kernels.cuda.compile_variants import NAMED_JOBS, compile_all

LOWEST_PRIORITY = 19


def libraries() -> Iterator[Library]:
    """Those made by g++, in about the order of their use. Some come twice."""
    for target in (*runnable_targets(), *WRITTEN_OUT):
        for dtype, kv_dtype in DTYPES:
            yield library(target, fitting_dtype(target, dtype), fitting_dtype(target, kv_dtype))
    for variant in NAMED_VARIANTS:
        yield emulated_library(dataclasses.replace(variant, has_window=False))
        yield emulated_library(variant)


def main() -> None:
    """What can't be compiled is left to the tests."""
    os.nice(LOWEST_PRIORITY)
    for made in libraries():
        with contextlib.suppress(BuildError):
            shared_library(made)
    list(compile_all(NAMED_JOBS))


if __name__ == "__main__":
    main()
