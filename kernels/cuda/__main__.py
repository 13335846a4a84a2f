"""`python -m kernels.cuda [sm_80 ...]` compiles CUDA kernels ahead, for images that carry no nvcc.

By default what most models need: bfloat16 and float16, head_dim 64 and 128, blocks of 16, with and without a sliding
window, KV of the same dtype and of 8 bits. What a model needs beyond that is compiled when it is met, if nvcc is there.
"""

import argparse
import logging
import re
import sys

import torch

from kernels.build import shared_library
from kernels.cuda.variant import EIGHT_BIT_ELEMENTS, HEAD_DIMS, Variant, device_library

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")


def main(arguments: list[str]) -> None:
    """Prints the path of each library."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cuda", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="sm_XY")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], choices=HEAD_DIMS)
    parser.add_argument("--block-size", type=int, nargs="+", default=[16], choices=[16, 32])
    flags = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for architecture in flags.architectures:
        match = re.fullmatch(r"sm_(\d+)(\d)", architecture)
        if match is None:
            parser.error(f"{architecture} is no architecture: write sm_90")
        for variant in usual_variants(flags.head_dim, flags.block_size):
            library = device_library(variant, (int(match[1]), int(match[2])))
            sys.stdout.write(f"{shared_library(library)}\n")


def usual_variants(head_dims: list[int], block_sizes: list[int]) -> list[Variant]:
    """See the module."""
    return [
        Variant(dtype, head_dim, block_size, has_window=has_window, kv_dtype=kv_dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for kv_dtype in (None, *EIGHT_BIT_ELEMENTS)
        for head_dim in head_dims
        for block_size in block_sizes
        for has_window in (False, True)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
