"""Tensors that end where memory ends: reading or writing one byte past them is a fault, not a wrong number."""

import ctypes
import mmap

import torch

PAGE_BYTES = mmap.PAGESIZE
PROT_NONE = 0


def guarded(source: torch.Tensor) -> torch.Tensor:
    """A copy of `source`, its last byte the last before a page that must not be touched."""
    num_bytes = source.numel() * source.element_size()
    num_pages = -(-num_bytes // PAGE_BYTES)
    memory = mmap.mmap(-1, (num_pages + 1) * PAGE_BYTES)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(everything.data_ptr() + num_pages * PAGE_BYTES)
    if libc.mprotect(guard, ctypes.c_size_t(PAGE_BYTES), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = num_pages * PAGE_BYTES - num_bytes
    copy = everything[start : start + num_bytes].view(source.dtype).view(source.shape)
    return copy.copy_(source)
