"""Prefetches that are still there when the compiler is done: it may take them for nothing, and no result would tell."""

import shutil
import subprocess

import pytest
import torch

from kernels.build import find_compiler, shared_library
from kernels.cpu.targets import AMX, library

READS_WEIGHTS = "tileloaddt1"


@pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_who_reads_weights_by_tiles_prefetches_them() -> None:
    path = shared_library(library(AMX, torch.bfloat16, torch.bfloat16))
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    functions = [function for function in listing.stdout.split("\n\n") if READS_WEIGHTS in function]
    assert functions
    for function in functions:
        assert "prefetcht0" in function, function.splitlines()[0]
