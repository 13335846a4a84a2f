"""A variant as nvcc compiles it, on this CPU: its PTX, translated to C++ and made into a library over the emulation."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path

from kernels import build
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import EMULATION_HEADERS, HEADERS, NVCC, SOURCE, Variant, device_library, emulated_library
from tests.kernels.cuda.ptx.translate import translate

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[3]
MACHINE = FOLDER / "machine.cpp"
MACHINE_HEADERS = tuple(sorted(FOLDER.glob("*.h")))
CAPABILITY = (9, 0)


def ptx_of(variant: Variant) -> str:
    """Raises CalledProcessError where nvcc refuses; needs nvcc."""
    nvcc = build.find_compiler(NVCC)
    assert nvcc is not None
    flags = [flag for flag in device_library(variant, CAPABILITY).flags if flag != "-shared"]
    command = [nvcc, *flags, "-ptx", "-o", "-", str(SOURCE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def library_of(variant: Variant, ptx: str) -> build.Library:
    """Runs `ptx`, which was made from the variant's kernels, on this CPU (x86-64)."""
    translated = translate(ptx)
    name = f"{variant.name}_ptx"
    source = build.cache_folder() / f"{name}-{hashlib.sha256(translated.encode()).hexdigest()[:16]}.cpp"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        partial = source.with_suffix(f".{os.getpid()}")
        partial.write_text(translated, "utf-8")
        partial.replace(source)
    like_the_emulation = [flag for flag in emulated_library(variant).flags if flag not in ("-x", "c++")]
    return build.Library(
        name=name,
        compilers=emulated_library(variant).compilers,
        flags=(*like_the_emulation, "-ffp-contract=off", "-fwrapv", f"-I{ROOT}", f"-I{FOLDER}"),
        sources=(MACHINE, source),
        headers=(*MACHINE_HEADERS, SOURCE, *HEADERS, *EMULATION_HEADERS),
    )


@functools.cache
def open_ptx(variant: Variant) -> KernelLibrary:
    """What nvcc made of the variant, on this CPU."""
    return KernelLibrary(build.shared_library(library_of(variant, ptx_of(variant))))
