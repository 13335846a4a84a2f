"""Compiles variants with nvcc, refusing any that spills registers to memory. Run as a module, it compiles all of them.

What was compiled is kept, so that an interrupted run goes on where it stopped.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels import build
from kernels.cuda.variant import NAMED_VARIANTS, Variant, all_variants, device_library

CAPABILITIES = ((9, 0), (8, 0), (8, 9))
# Each named variant for one architecture, in turn.
NAMED_JOBS = [(variant, CAPABILITIES[i % len(CAPABILITIES)]) for i, variant in enumerate(NAMED_VARIANTS)]
NO_SPILL_FLAGS = ("-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror")
NUM_COMPILERS = 2


def compile_variant(variant: Variant, capability: tuple[int, int]) -> Path:
    """The library. Raises BuildError if it does not compile, or spills."""
    library = device_library(variant, capability)
    return build.shared_library(
        dataclasses.replace(library, name=f"checked_{library.name}", flags=(*library.flags, *NO_SPILL_FLAGS))
    )


def compile_all(jobs: Iterable[tuple[Variant, tuple[int, int]]]) -> Iterator[tuple[str, str | None]]:
    """Name and error of each, a few at a time, in order."""

    def attempt(job: tuple[Variant, tuple[int, int]]) -> tuple[str, str | None]:
        variant, (major, minor) = job
        name = f"{variant.name} sm_{major}{minor}"
        try:
            compile_variant(*job)
        except build.BuildError as error:
            return name, str(error)
        return name, None

    with ThreadPoolExecutor(NUM_COMPILERS) as pool:
        yield from pool.map(attempt, jobs)


def main() -> None:
    """Print a line for each variant and architecture; fail if one failed."""
    jobs = [(variant, capability) for capability in CAPABILITIES for variant in all_variants()]
    failed = 0
    for i, (name, error) in enumerate(compile_all(jobs), 1):
        failed += error is not None
        print(f"{i}/{len(jobs)} {name}: {error or 'compiled, no spills'}", flush=True)
    sys.exit(f"{failed} of {len(jobs)} failed" if failed else 0)


if __name__ == "__main__":
    main()
