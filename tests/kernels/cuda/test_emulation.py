"""The emulation itself: wrong kernels are told apart from a right one, whatever the order of threads."""

import ctypes
import functools
import subprocess
import sys
from ctypes import c_void_p
from pathlib import Path

import pytest
import torch

from kernels import build
from kernels.cuda.variant import EMULATION_HEADERS, HEADERS, Variant, emulated_library

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).parent / "broken_kernels.cu"
SEEDS = range(8)


class Args(ctypes.Structure):
    _fields_ = [("source", c_void_p), ("out", c_void_p)]


@functools.cache
def library() -> ctypes.CDLL:
    flags = emulated_library(Variant(torch.float32, 64, 16)).flags
    made = build.Library("broken_kernels", ("g++",), (f"-I{ROOT}", *flags), (SOURCE,), (*HEADERS, *EMULATION_HEADERS))
    loaded = ctypes.CDLL(str(build.shared_library(made)))
    loaded.message.restype = ctypes.c_char_p
    return loaded


def run(kernel: str, seed: int) -> tuple[str, torch.Tensor]:
    """What the emulation says, and what the kernel wrote: [64]."""
    source, out = torch.arange(256, dtype=torch.float32), torch.full((64,), -1.0)
    library().seed(ctypes.c_uint64(seed))
    status = library().run(kernel.encode(), ctypes.byref(Args(source.data_ptr(), out.data_ptr())))
    return (library().message().decode() if status else ""), out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_runs(seed: int) -> None:
    message, out = run("right", seed)
    assert message == ""
    assert out.tolist() == [4 * (i ^ 1) for i in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ["no_wait", "waits_for_too_few", "no_barrier_after_wait"])
def test_a_tile_read_too_early_is_nan(kernel: str, seed: int) -> None:
    message, out = run(kernel, seed)
    assert message == ""
    assert out.isnan().any()


def test_a_missing_barrier_shows_in_some_order() -> None:
    results = [run("no_barrier_between_warps", seed)[1] for seed in SEEDS]
    assert any(out.isnan().any() for out in results)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("ends_before_copies", "copies that it never waited for"),
        ("no_commit", "copies that it never committed"),
        ("diverges", "divergence"),
        ("half_a_warp_shuffles", "deadlock"),
        ("half_the_block_waits", "deadlock"),
        ("rows_in_the_same_banks", "bank conflict"),
    ],
)
def test_threads_that_disagree_are_named(kernel: str, said: str, seed: int) -> None:
    message, _ = run(kernel, seed)
    assert said in message
    assert run("right", seed)[0] == ""


def test_reading_past_shared_memory_ends_the_process() -> None:
    code = "from tests.kernels.cuda.test_emulation import run; run('out_of_shared_memory', 0)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == -11
