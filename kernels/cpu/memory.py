"""Memory for KV blocks: on huge pages where the system has them.

Blocks are read in random order; on pages of 4 KiB nearly every block would miss the TLB.
"""

import contextlib
import ctypes
import math
import mmap
import os
import threading

import torch

HUGE_PAGE_BYTES = 2**21
THREAD_NAME = "pages"
MADV_POPULATE_WRITE = 23  # of Linux from 5.14 on (include/uapi/asm-generic/mman-common.h)


def empty_on_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, zeroed by the system page by page, when first touched."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE_BYTES
    return everything[start : start + num_bytes].view(dtype).view(shape)


def populate(planes: torch.Tensor) -> threading.Thread:
    """Has the system find pages for memory before it is used, by a thread that runs where a core is idle.

    planes: [num_planes, num_bytes], whose contents stay. They are walked side by side, as blocks of a pool are used.
    """
    thread = threading.Thread(target=_populate, args=(planes,), name=THREAD_NAME, daemon=True)
    thread.start()
    return thread


def _populate(planes: torch.Tensor) -> None:
    if not hasattr(os, "SCHED_IDLE"):
        return
    with contextlib.suppress(OSError):  # where a sandbox forbids it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread alone
    madvise = ctypes.CDLL(None).madvise
    for begin in range(0, planes.shape[1], HUGE_PAGE_BYTES):
        for plane in planes:
            part = plane[begin : begin + HUGE_PAGE_BYTES]
            end, start = part.data_ptr() + part.numel(), part.data_ptr() & -mmap.PAGESIZE
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_WRITE) != 0:
                return  # not known to an older system; where memory has run out, who uses it will see
