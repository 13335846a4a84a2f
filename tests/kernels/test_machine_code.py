"""What the compiler made of inner loops: prefetches that are still there, sums that stay in registers.

No result would tell, and a benchmark only who knows what to expect.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from kernels.build import find_compiler, shared_library
from kernels.cpu.targets import AMX, AVX512_BF16, Target, library

pytestmark = [
    pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump"),
]
READS_WEIGHTS = "tileloaddt1"
DOTS = ("vdpbf16ps", "vpdpbusd")
FEWEST_DOTS = 16
"""Of a loop that has enough sums to fill registers."""
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")
STORE_TO_STACK = re.compile(r"vmov\w+\s+%zmm\d+,.*\(%r[sb]p")


def functions(target: Target) -> Iterator[tuple[str, dict[int, str]]]:
    """Names and instructions, by address, of what multiplies bfloat16 by bfloat16."""
    path = shared_library(library(target, torch.bfloat16, torch.bfloat16))
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in listing.split("\n\n"):
        name, _, body = part.strip().partition("\n")
        lines = (line.partition(":") for line in body.splitlines())
        yield name, {int(address, 16): text.strip() for address, colon, text in lines if colon}


def innermost_loops(instructions: dict[int, str]) -> Iterator[list[str]]:
    """Their instructions: from where a jump leads back to the jump, with no such pair between."""
    jumps = ((address, JUMP.match(text)) for address, text in instructions.items())
    loops = [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) <= address]
    for begin, end in loops:
        if begin in instructions and not any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end)):
            yield [text for address, text in instructions.items() if begin <= address <= end]


def test_who_reads_weights_by_tiles_prefetches_them() -> None:
    listings = [(name, "\n".join(found.values())) for name, found in functions(AMX)]
    reading = [(name, listing) for name, listing in listings if READS_WEIGHTS in listing]
    assert reading
    for name, listing in reading:
        assert "prefetcht0" in listing, name


def test_sums_of_dot_products_stay_in_registers() -> None:
    """In memory they take twice the time. Where the first rows prefetch some wait there, while that is called."""
    num_loops = 0
    for name, instructions in functions(AVX512_BF16):
        for loop in innermost_loops(instructions):
            num_dots = sum(text.startswith(DOTS) for text in loop)
            num_stores = sum(STORE_TO_STACK.match(text) is not None for text in loop)
            num_loops += num_dots >= FEWEST_DOTS
            assert num_dots < FEWEST_DOTS or num_stores <= num_dots / 8, (name, num_dots, num_stores)
    assert num_loops > 10
