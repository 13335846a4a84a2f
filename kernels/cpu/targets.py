"""Which instruction sets the CPU kernels are compiled for, and which of them this machine runs."""

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.build import Library

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-pthread", "-fPIC", "-shared", "-fvisibility=hidden")
# As `elements.h` names them.
ELEMENTS: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.int8: "Int8",
    torch.float8_e4m3fn: "Float8",
}


@dataclass(frozen=True, slots=True)
class Target:
    """An instruction set: the compiler's flags for it, and the CPU's flags (as Linux names them) that it needs."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


AVX2_FLAGS = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "sse4_1", "sse4_2", "ssse3")
AVX512_FLAGS = ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
AVX512 = Target("avx512", ("-march=x86-64-v4",), frozenset(AVX2_FLAGS + AVX512_FLAGS))
# The same, and products of bfloat16 by the two, of bytes by the four.
AVX512_BF16 = Target(
    "avx512bf16",
    (*AVX512.flags, "-mavx512bf16", "-mavx512vnni"),
    AVX512.needs | {"avx512_bf16", "avx512_vnni"},
)
AVX2 = Target("avx2", ("-march=x86-64-v3",), frozenset(AVX2_FLAGS))
BASELINE = Target("baseline", (), frozenset())
# The same, and products of bfloat16 by tiles.
AMX_FLAGS = frozenset({"amx_tile", "amx_bf16"})
AMX = Target("amx", (*AVX512_BF16.flags, "-mamx-tile", "-mamx-bf16"), AVX512_BF16.needs | AMX_FLAGS)
# The best first.
TARGETS = (AMX, AVX512_BF16, AVX512, AVX2, BASELINE)
# Linux saves a process's tiles only for who asked for it (arch/x86/include/uapi/asm/prctl.h).
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def runnable_targets() -> tuple[Target, ...]:
    """Those that this machine runs, the best first."""
    return tuple(target for target in TARGETS if target.needs <= _usable_flags())


def library(target: Target, dtype: torch.dtype, kv_dtype: torch.dtype, has_soft_cap: bool = False) -> Library:
    """The CPU kernels for `target`, and for weights and activations of `dtype` beside a pool of `kv_dtype`."""
    element, kv = ELEMENTS[dtype], ELEMENTS[kv_dtype]
    soft_cap = ["-DPAGODA_SOFT_CAP"] * has_soft_cap
    return Library(
        name=f"cpu-{target.name}-{element}-{kv}{'-softcap' * has_soft_cap}".lower(),
        compilers=("g++",),
        flags=(*FLAGS, *target.flags, f"-DPAGODA_ELEMENT={element}", f"-DPAGODA_KV={kv}", *soft_cap),
        sources=tuple(sorted(FOLDER.glob("*/*.cpp"))),
        headers=tuple(sorted(FOLDER.glob("*/*.h"))),
    )


@cache
def _usable_flags() -> frozenset[str]:
    """Of the CPU, without AMX's where the system does not let this process use its tiles."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return frozenset()
    flags = _cpu_flags()
    if flags >= AMX_FLAGS:
        refused = ctypes.CDLL(None).syscall(
            *map(ctypes.c_long, (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
        )
        flags -= AMX_FLAGS if refused else frozenset()
    return flags


def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
