"""Memory for KV blocks: what is populated is there, and stays as it was."""

import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

from kernels.cpu.memory import HUGE_PAGE_BYTES, MADV_POPULATE_WRITE, THREAD_NAME, empty_on_huge_pages, populate
from kernels.kv_format import KVFormat
from worker.kv_pool import KVPool

NUM_PLANES, PLANE_BYTES = 3, 10 * HUGE_PAGE_BYTES + 1234


needs_populate = pytest.mark.skipif(
    ctypes.CDLL(None).madvise(None, ctypes.c_size_t(0), MADV_POPULATE_WRITE) != 0, reason="needs Linux from 5.14 on"
)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@needs_populate
def test_populated_memory_is_there_before_it_is_used() -> None:
    planes = empty_on_huge_pages((NUM_PLANES, PLANE_BYTES), torch.uint8)
    planes[1, 5] = 77
    before = _resident_bytes()
    populate(planes).join()
    found = _resident_bytes() - before
    assert found > 0.9 * planes.numel(), found
    assert planes[1, 5] == 77
    assert planes.count_nonzero() == 1


@needs_populate
def test_a_worker_populates_its_pool() -> None:
    before = _resident_bytes()
    pool = KVPool(2, 63, KVFormat(torch.float32, 16, 64, 16, 1), torch.device("cpu"))
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join()
    assert _resident_bytes() - before > 0.9 * pool.blocks.numel()
