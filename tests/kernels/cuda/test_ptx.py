"""The translation of PTX, by instructions written by hand: what they compute, and what they may not do."""

import functools
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import BlockCopy, KernelError, build
from kernels.cuda.attention import Backend
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import NVCC, Variant
from tests.kernels.cuda.backends import needs_nvcc
from tests.kernels.cuda.ptx.library import library_of
from tests.kernels.cuda.ptx.translate import TranslationError, translate
from tests.kernels.cuda.steps import kernels_for

BY_HAND = Path(__file__).parent / "ptx" / "by_hand.ptx"
SEEDS = range(4)


@functools.cache
def open_by_hand(variant: Variant) -> KernelLibrary:
    return KernelLibrary(build.shared_library(library_of(variant, BY_HAND.read_text("utf-8"))))


def run(choice: int, seed: int = 0, num_blocks: int = 1) -> torch.Tensor:
    """What the chosen part of by_hand.ptx leaves in memory, in words, 128 a row."""
    kernels = kernels_for(Backend(open_by_hand, lambda: 0), Variant(torch.float32, 64, 16), 1, 1)
    kernels.library(has_window=False).seed_emulation(seed)
    pool = torch.zeros(1, 1, 1, choice, 512, dtype=torch.uint8)
    kernels.copy_blocks(pool, [BlockCopy(0, 1 + i, 16) for i in range(num_blocks)])
    return pool.view(torch.int32).view(-1, 128)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_runs_is_the_ptx(seed: int) -> None:
    assert run(7, seed)[0].tolist() == [4 * (i ^ 1) for i in range(128)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (1, r"misaligned: st\.global\.u32 \[%rd3\+2\], %r2; \(line \d+\)"),
        (2, "not in shared memory: st.shared"),
        (3, r"divergence: lanes of one warp are at mma.* \(line \d+\) and at mma"),
        (4, "not all lanes of a warp are named: shfl"),
        (5, "a part of a chunk is copied: cp.async"),
    ],
)
def test_what_a_gpu_would_not_take_is_named(choice: int, said: str, seed: int) -> None:
    with pytest.raises(KernelError, match=said):
        run(choice, seed)


def test_instructions_compute_what_the_isa_says() -> None:
    a, b = 0x12345678, 0x9ABCDEF0
    signed = b - 2**32
    whole = [
        0xFF56F09A,  # prmt: bytes 7, 4, 1, and the sign of byte 4
        0x9ABCD780,  # bfi: 8 bits from bit 4 on
        a & b ^ 0xFF00FF00,
        *(0, 0xFFFFFFFF, 9),  # shifts by more than there is, and by 28
        signed * a >> 32,
        b * a >> 32,
        a * b - 1,
        int(signed / 1000),
        signed - int(signed / 1000) * 1000,
        -1,  # of -1.0000001
        0,  # of NaN
        0x3F80BF80,
        0xBC00,
        0x56781234,
    ]
    # 1 + 2^-23 by itself is 1 + 2^-22 and a little more; NaN and a number; a size with a sign; 2^0; NaN in [0, 1].
    floats = [0x3F800002, 0xBF800003, 0xBF800002, 0x3F800001, 0x80400000, 0x3F800000, 0, 0x00400000]
    expected = [word % 2**32 for word in [*whole, *floats, 0xFFFFFFFF, 1, 0]]
    found = struct.unpack(f"<{len(expected)}I", run(6)[0, : len(expected)].numpy().tobytes())
    assert [f"{word:08x}" for word in found] == [f"{word:08x}" for word in expected]


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("fences", "num_late"), [(0, 2), (1, 2), (2, 2), (3, 0)])
def test_blocks_see_what_others_wrote_after_two_fences(fences: int, num_late: int, seed: int) -> None:
    """One block of the three that read has its place beside the writer, where all is seen at once."""
    seen = run(8 + fences, seed, num_blocks=4)[3:6]
    assert seen[:, :1].expand(-1, 128).equal(seen)
    assert (seen[:, 0] == 0).sum() == num_late


@needs_nvcc
def test_it_is_ptx(tmp_path: Path) -> None:
    nvcc = build.find_compiler(NVCC)
    assert nvcc is not None
    subprocess.run([nvcc, "-arch=sm_90", "-cubin", "-o", tmp_path / "by_hand.cubin", BY_HAND], check=True)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("mov.u32 \t%r2, %tid.x;", "mov.u32 \t%r2, %clock;", "unknown operand: %clock"),
        ("[bytes+16], %r2;", "[bytes+16+4], %r2;", r"unknown address: \[bytes\+16\+4\]"),
        ("st.shared.u32", "st.local.u32", "memory is reached in an unknown way: .*st.local"),
        ("m16n8k16.row.col.f32.bf16", "m16n8k8.row.col.f32.bf16", "unknown instruction: .*m16n8k8"),
        ("shfl.sync.bfly", "shfl.sync.up", "unknown instruction: .*shfl.sync.up"),
        ("membar.gl;", "trap;", "unknown instruction: .*trap"),
        ("[args+40];", "[args+40]", "not understood: ld.param"),
        ("\t.param .align 8 .b8 args[48]", "\t.param .u64 args", "does not take one structure"),
    ],
)
def test_what_is_not_known_is_an_error(before: str, after: str, said: str) -> None:
    ptx = BY_HAND.read_text("utf-8")
    assert before in ptx
    with pytest.raises(TranslationError, match=said):
        translate(ptx.replace(before, after, 1))
