"""Whether CUDA kernels can serve a model on a device: they, or the reference and a line in the log."""

import logging

import torch

from kernels import AttentionShape, Kernels, build
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import EIGHT_BIT_ELEMENTS, NVCC, Variant, device_library, is_supported
from kernels.reference import ReferenceKernels

log = logging.getLogger("pagoda.kernels")

FIRST_CAPABILITY = (8, 0)


def select_cuda_kernels(device: torch.device, shape: AttentionShape) -> Kernels:
    """For a CUDA `device`. Variants are compiled when a dtype first meets them, which is in the worker's warm-up."""
    capability = torch.cuda.get_device_capability(device)
    lack = find_lack(shape, capability)
    if lack is not None:
        log.warning("the reference kernels serve on %s, many times slower: %s", device, lack)
        return ReferenceKernels(device, shape)

    return CudaKernels(device, shape, cuda_backend(device), Tuning())


def cuda_backend(device: torch.device) -> Backend:
    """Libraries for `device`, and torch's current stream there, which must be the current device at every launch."""
    capability = torch.cuda.get_device_capability(device)

    def open_library(variant: Variant) -> KernelLibrary:
        path = build.shared_library(device_library(variant, capability))
        with torch.cuda.device(device):
            return KernelLibrary(path)

    def current_stream() -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    return Backend(open_library, current_stream)


def find_lack(shape: AttentionShape, capability: tuple[int, int]) -> str | None:
    """What there is no kernel for, or what is missing to make one; None where nothing is."""
    if capability < FIRST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if shape.kv_dtype not in (shape.dtype, *EIGHT_BIT_ELEMENTS):
        return f"KV of {shape.kv_dtype} beside {shape.dtype}"
    group_size = shape.num_heads // shape.num_kv_heads
    if not is_supported(shape.dtype, shape.kv_dtype, shape.head_dim, shape.block_size, group_size):
        blocks = f"block size {shape.block_size}, {group_size} heads per KV head"
        return f"{shape.dtype}, head_dim {shape.head_dim}, {blocks}"
    made_ahead = build.cache_folder().glob(f"cuda_*_sm_{capability[0]}{capability[1]}-*.so")
    if build.find_compiler(NVCC) is None and next(made_ahead, None) is None:
        return "no nvcc, and none made ahead"
    return None
