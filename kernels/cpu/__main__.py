"""`python -m kernels.cpu [TARGET ...]` compiles the CPU kernels ahead: the CPU is not known where an image is built."""

import logging
import sys

import torch

from kernels.build import shared_library
from kernels.cpu.targets import TARGETS, library
from kernels.kv_format import LARGEST

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(names: list[str]) -> None:
    """Compile for the instruction sets of these names, or for all; every dtype, every KV dtype beside it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for target in TARGETS:
        if not names or target.name in names:
            for dtype in DTYPES:
                for kv_dtype in (dtype, *LARGEST):
                    sys.stdout.write(f"{shared_library(library(target, dtype, kv_dtype))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
