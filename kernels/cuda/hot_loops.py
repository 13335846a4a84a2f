"""`make count-cuda`: what a warp issues for a tile in the attention kernels' loops over tokens, from the machine code.

Needs nvcc, cuobjdump and nvdisasm (in CUDA's toolkit, or the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm on
the PATH), and no GPU. Counted is what most tiles take: not what a branch jumps over when it neither loads nor
multiplies, which hides and shrinks (attend.cuh).
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels.build import find_compiler, shared_library
from kernels.cuda.variant import Variant, device_library

CUOBJDUMP = ("cuobjdump", "/usr/local/cuda/bin/cuobjdump")
CAPABILITY = (9, 0)
VARIANTS = (
    Variant(torch.bfloat16, 64, 16),
    Variant(torch.bfloat16, 128, 16),
    Variant(torch.bfloat16, 256, 16),
    Variant(torch.bfloat16, 128, 16, kv_dtype=torch.float8_e4m3fn),
    Variant(torch.bfloat16, 128, 16, kv_dtype=torch.int8),
)
KERNELS = ("decode_kernel", "prefill_kernel")
# The smallest loop with so many products is that over the tokens.
MIN_PRODUCTS = 16
PRODUCT, MATRIX_LOAD = "HMMA", "LDSM"
IS_NEEDED = (PRODUCT, MATRIX_LOAD, "LDG")  # LDGSTS, too


@dataclass(frozen=True, slots=True)
class Instruction:
    """target: of a branch to a place in the same function."""

    address: int
    text: str
    target: int | None

    def does(self, *names: str) -> bool:
        """Whether its name begins with one of these."""
        words = self.text.split()
        name = words[1] if words[0].startswith("@") else words[0]
        return name.startswith(names)


@dataclass(frozen=True, slots=True)
class Count:
    """Instructions of a tile; those of them that multiply, and that load operands; and those that most tiles skip."""

    issued: int
    products: int
    matrix_loads: int
    skipped: int


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and code of each function in what `cuobjdump -sass` prints."""
    headings = [*re.finditer(r"Function : (\S+)", listing)]
    ends = [heading.start() for heading in headings[1:]] + [len(listing)]
    for heading, end in zip(headings, ends, strict=True):
        code = []
        for match in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing[heading.end() : end]):
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", match[2])
            code.append(Instruction(int(match[1], 16), match[2].strip(), int(target[1], 16) if target else None))
        yield heading[1], code


def count_tile(code: Sequence[Instruction]) -> Count | None:
    """Of the loop over the tokens; None where there is none."""
    loops = [
        [one for one in code if end.target <= one.address <= end.address]
        for end in code
        if end.target is not None and end.target <= end.address
    ]
    loops = [loop for loop in loops if sum(one.does(PRODUCT) for one in loop) >= MIN_PRODUCTS]
    if not loops:
        return None
    loop = min(loops, key=len)
    skipped = sum(map(len, _skipped(loop)))
    products, loads = (sum(one.does(name) for one in loop) for name in (PRODUCT, MATRIX_LOAD))
    return Count(len(loop) - skipped, products, loads, skipped)


def _skipped(loop: Sequence[Instruction]) -> Iterator[list[Instruction]]:
    """What stands between a branch and where it goes to, within the loop."""
    for branch, after in pairwise(loop):
        if branch.target is not None and after.address < branch.target <= loop[-1].address:
            block = [one for one in loop if after.address <= one.address < branch.target]
            if not any(one.does(*IS_NEEDED) for one in block):
                yield block


def main() -> None:
    """Prints a line for each variant and kernel."""
    cuobjdump = find_compiler(CUOBJDUMP)
    if cuobjdump is None:
        sys.exit(f"no {CUOBJDUMP[0]} here: it is in CUDA's toolkit, or the package nvidia-cuda-cuobjdump")
    for variant in VARIANTS:
        path = shared_library(device_library(variant, CAPABILITY))
        disassembly = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=False)
        if disassembly.returncode != 0:
            sys.exit(disassembly.stderr.strip())
        for name, code in functions(disassembly.stdout):
            for kernel in KERNELS:
                count = count_tile(code) if kernel in name else None
                if count is not None:
                    sys.stdout.write(
                        f"{variant.name} {kernel}: {count.issued} instructions a tile, {count.products} of them"
                        f" {PRODUCT}, {count.matrix_loads} {MATRIX_LOAD}; {count.skipped} more where there is cause\n"
                    )


if __name__ == "__main__":
    main()
