"""Tensors that end where an unreadable page begins: a kernel that reads past one ends the process."""

import ctypes
import mmap
import weakref

import torch

PAGE_BYTES = mmap.PAGESIZE
CHUNK_BYTES = 16
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`, contiguous, its end at an unreadable page, another one before it.

    What is read by chunks of 16 bytes begins at a multiple of that, and its end is rounded up.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return tensor.clone()
    alignment_bytes = CHUNK_BYTES if tensor.is_floating_point() else tensor.element_size()
    padded_bytes = -(-num_bytes // alignment_bytes) * alignment_bytes
    usable_bytes = -(-padded_bytes // PAGE_BYTES) * PAGE_BYTES
    mapped_bytes = usable_bytes + 2 * PAGE_BYTES
    mapped = _libc.mmap(None, mapped_bytes, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    first = mapped + PAGE_BYTES
    assert _libc.mprotect(first, usable_bytes, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    buffer = (ctypes.c_char * num_bytes).from_address(first + usable_bytes - padded_bytes)
    weakref.finalize(buffer, _libc.munmap, mapped, mapped_bytes)
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
