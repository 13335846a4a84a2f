"""What is fixed when the kernels are compiled, and how a variant becomes a shared library.

Owns compilers and flags. The device code is compiled for one architecture: the machine's own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import build

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "library.cu"
HEADERS = tuple(sorted(FOLDER.glob("*.cuh")))
EMULATION_HEADERS = tuple(sorted((FOLDER / "emulation").glob("*.h")))
NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc")
HOST_COMPILERS = ("g++",)

ELEMENTS = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "float"}
# Of the pool beside any of those.
EIGHT_BIT_ELEMENTS = {torch.int8: "Int8", torch.float8_e4m3fn: "Float8"}
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32)
MAX_GROUP_SIZE = 16
# Tokens and rows are read by chunks of so many bytes, which lie at multiples of it.
CHUNK_BYTES = 16
# Shared memory in KiB that one block may take: what a device of this capability has, or what lets it run two. Two of
# heads of 256 have no room everywhere.
SHARED_KIB = {(8, 6): 99, (8, 9): 99, (12, 0): 99, (12, 1): 99}
USUAL_SHARED_KIB = 113
SHARED_KIB_UP_TO_128 = {(8, 0): 81, (8, 7): 81}


@dataclass(frozen=True, slots=True)
class Variant:
    """A model's attention. has_window: a sliding window of any length; has_soft_cap: cap * tanh(score / cap).

    kv_dtype: an 8-bit one, with scales; None where keys and values are held in `dtype`.
    """

    dtype: torch.dtype
    head_dim: int
    block_size: int
    has_window: bool = False
    has_soft_cap: bool = False
    kv_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """As in "cuda_bfloat16_d128_b16_window", "cuda_float16_int8_d64_b16"."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype) if dtype is not None]
        parts = ["cuda", *dtypes, f"d{self.head_dim}", f"b{self.block_size}"]
        return "_".join(parts + ["window"] * self.has_window + ["softcap"] * self.has_soft_cap)

    @property
    def loaded(self) -> set["Variant"]:
        """What a model needs for it: attention of its own, and all else, which knows no window."""
        return {self, replace(self, has_window=False)}

    @property
    def defines(self) -> tuple[str, ...]:
        """Flags for any compiler."""
        return (
            f"-DPAGODA_ELEMENT={ELEMENTS[self.dtype]}",
            *([f"-DPAGODA_KV={EIGHT_BIT_ELEMENTS[self.kv_dtype]}"] if self.kv_dtype is not None else []),
            f"-DPAGODA_HEAD_DIM={self.head_dim}",
            f"-DPAGODA_BLOCK_SIZE={self.block_size}",
            *["-DPAGODA_SLIDING_WINDOW"] * self.has_window,
            *["-DPAGODA_SOFT_CAP"] * self.has_soft_cap,
        )


# One or more of each dtype, head_dim, block size and feature: what tests compile.
NAMED_VARIANTS = (
    Variant(torch.bfloat16, 64, 16),
    Variant(torch.bfloat16, 80, 16, has_window=True),
    Variant(torch.bfloat16, 96, 32),
    Variant(torch.bfloat16, 128, 16),
    Variant(torch.bfloat16, 128, 16, has_window=True),
    Variant(torch.bfloat16, 256, 16, has_window=True, has_soft_cap=True),
    Variant(torch.float16, 64, 32, has_soft_cap=True),
    Variant(torch.float16, 80, 32),
    Variant(torch.float16, 128, 32),
    Variant(torch.float32, 64, 16),
    Variant(torch.float32, 128, 32, has_window=True),
    Variant(torch.float32, 256, 16),
    Variant(torch.bfloat16, 128, 16, kv_dtype=torch.float8_e4m3fn),
    Variant(torch.bfloat16, 64, 16, kv_dtype=torch.int8),
    Variant(torch.float16, 80, 32, has_window=True, kv_dtype=torch.int8),
    Variant(torch.float32, 64, 16, kv_dtype=torch.int8),
)


def all_variants() -> list[Variant]:
    """Every combination that is supported, but for the small head_dims of float32."""
    flags = (False, True)
    return [
        Variant(dtype, head_dim, block_size, has_window, has_soft_cap, kv_dtype)
        for kv_dtype in (None, *EIGHT_BIT_ELEMENTS)
        for dtype in ELEMENTS
        for head_dim in HEAD_DIMS
        for block_size in BLOCK_SIZES
        for has_window in flags
        for has_soft_cap in flags
    ]


def is_supported(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, block_size: int, group_size: int) -> bool:
    """Whether there are kernels for a shape; also of head_dims that have no name in HEAD_DIMS."""
    multiple = 8 if dtype == kv_dtype == torch.float32 else 16
    fits_rows = head_dim % multiple == 0 and head_dim <= max(HEAD_DIMS)
    return fits_rows and block_size % 16 == 0 and group_size <= MAX_GROUP_SIZE


def shared_kib(head_dim: int, capability: tuple[int, int]) -> int:
    """What a block may take."""
    if head_dim <= 128 and capability in SHARED_KIB_UP_TO_128:
        return SHARED_KIB_UP_TO_128[capability]
    return SHARED_KIB.get(capability, USUAL_SHARED_KIB)


def device_library(variant: Variant, capability: tuple[int, int]) -> build.Library:
    """For a GPU of `capability`, as in (9, 0)."""
    arch = f"sm_{capability[0]}{capability[1]}"
    return build.Library(
        name=f"{variant.name}_{arch}",
        compilers=NVCC,
        flags=(
            *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}"),
            f"-DPAGODA_SHARED_KIB={shared_kib(variant.head_dim, capability)}",
            *variant.defines,
        ),
        sources=(SOURCE,),
        headers=HEADERS,
    )


def emulated_library(variant: Variant) -> build.Library:
    """For this CPU (x86-64), in emulation."""
    return build.Library(
        name=f"{variant.name}_emulated",
        compilers=HOST_COMPILERS,
        flags=(
            *("-O1", "-std=c++17", "-shared", "-fPIC", "-march=x86-64-v3", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
            "-fno-gnu-unique",  # each library has an emulated device of its own
            f"-DPAGODA_SHARED_KIB={USUAL_SHARED_KIB}",
            *variant.defines,
            *("-x", "c++"),
        ),
        sources=(SOURCE,),
        headers=(*HEADERS, *EMULATION_HEADERS),
    )
