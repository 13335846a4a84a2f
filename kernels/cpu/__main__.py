"""`python -m kernels.cpu [TARGET ...]` compiles the CPU kernels ahead: the CPU is not known where an image is built."""

import logging
import sys

from kernels.build import shared_library
from kernels.cpu.targets import TARGETS, library


def main(names: list[str]) -> None:
    """Compile for the instruction sets of these names, or for all."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for target in TARGETS:
        if not names or target.name in names:
            sys.stdout.write(f"{shared_library(library(target))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
