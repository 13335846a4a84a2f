"""Which instruction sets the CPU kernels are tried on: all that this machine runs, and some written out for those that
it may lack."""

import dataclasses
import os

import pytest
import torch

from kernels.cpu.targets import AMX, AVX2, AVX512, AVX512_BF16, BASELINE, Target, runnable_targets


def _written_out(name: str, macro: str) -> Target:
    plain = next(target for target in runnable_targets() if target in (AVX512, AVX2, BASELINE))
    return dataclasses.replace(plain, name=name, flags=(*plain.flags, f"-D{macro}"))


# What a CPU with units for bfloat16 runs, its operations in plain C++: dot products of pairs, and products of tiles.
DOTS = _written_out("dots-written-out", "PAGODA_BF16_DOTS")
TILES = _written_out("tiles-written-out", "PAGODA_TILES")
WRITTEN_OUT = (DOTS, TILES)
# What differs in bfloat16 alone from code that is tried anyway: compiling it again for other types would take minutes.
BFLOAT16_ALONE = (*WRITTEN_OUT, *(target for target in runnable_targets()[1:] if target in (AVX512_BF16, AVX512)))
if os.environ.get("PAGODA_TEST_LONG") == "1":
    BFLOAT16_ALONE = WRITTEN_OUT
# What a worker runs here, and what it would run elsewhere.
USED = (runnable_targets()[0], *WRITTEN_OUT)

# Of activations, and of the pool beside them.
DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((torch.bfloat16, torch.int8), (torch.float32, torch.float8_e4m3fn)),
]

targets = pytest.mark.parametrize("target", runnable_targets(), ids=lambda target: target.name)
used_targets = pytest.mark.parametrize("target", USED, ids=lambda target: target.name)
all_targets = pytest.mark.parametrize("target", [*runnable_targets(), *WRITTEN_OUT], ids=lambda target: target.name)


def rounds_rows(target: Target, dtype: torch.dtype) -> bool:
    """Whether the rows of a product are rounded to `dtype` before they are multiplied."""
    return dtype == torch.bfloat16 and target in (AMX, AVX512_BF16, *WRITTEN_OUT)


def fitting_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Of activations and of the pool: what this target is tried with instead of `dtype`."""
    if target not in BFLOAT16_ALONE or (target == TILES and dtype == torch.int8):
        return dtype
    return torch.bfloat16
