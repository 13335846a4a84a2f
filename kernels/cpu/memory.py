"""Memory for KV blocks: on huge pages where the system has them.

Blocks are read in random order; on pages of 4 KiB nearly every block would miss the TLB.
"""

import math
import mmap

import torch

HUGE_PAGE_BYTES = 2**21


def empty_on_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, zeroed by the system page by page, when first touched."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE_BYTES
    return everything[start : start + num_bytes].view(dtype).view(shape)
