"""The physical host pool: blocks in main memory, and the copies between it and the KV pool.

Owns the memory. What is in it, and what moves when, is the scheduler's to say. A host block is contiguous over all
layers, where a block of the KV pool lies in as many pieces as there are planes: on a GPU what moves is gathered into
one piece there, so that it crosses the bus in one run.
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu.memory import empty_on_huge_pages
from worker.errors import ConfigError
from worker.kv_pool import FreeMemory, KVPool, free_cpu_memory
from worker.swaps import Copier

# Where a flag does not say: on a GPU; on a CPU both pools would take the same memory.
GPU_HOST_BYTES = 4 * 2**30
# Blocks gathered at a time on a GPU.
CHUNK_BLOCKS = 16
MEASURED_BLOCKS = 8


def count_host_blocks(num_bytes: int | None, num_blocks: int | None, block_bytes: int, free: FreeMemory) -> int:
    """Usable host blocks. Raises ConfigError where they don't fit into main memory."""
    if num_blocks is None:
        num_blocks = (free.default_bytes if num_bytes is None else num_bytes) // block_bytes
    if num_blocks * block_bytes > free.most_bytes:
        wanted, most = num_blocks * block_bytes, free.most_bytes
        raise ConfigError(f"host-memory={wanted}: {most} bytes of main memory are free")
    return num_blocks


def free_host_memory(device: torch.device) -> FreeMemory:
    """Of main memory, for the host pool beside a KV pool on `device`."""
    most_bytes = free_cpu_memory().most_bytes
    return FreeMemory(0 if device.type == "cpu" else min(GPU_HOST_BYTES, most_bytes // 4), most_bytes)


class HostPool:
    """num_blocks usable host blocks, ids 1 to num_blocks.

    blocks: [num_blocks + 1, num_layers, 2, num_kv_heads, head_bytes] uint8, block 0 unused; pinned beside a GPU.
    """

    def __init__(self, num_blocks: int, pool: KVPool) -> None:
        self.num_blocks = num_blocks
        self.pool = pool
        num_layers, planes, _, *head = pool.blocks.shape
        shape = (num_blocks + 1, num_layers, planes, *head)
        if pool.blocks.device.type == "cpu":
            self.blocks = empty_on_huge_pages(shape, torch.uint8)
        else:
            self.blocks = self._pinned(shape)

    def _pinned(self, shape: tuple[int, ...]) -> torch.Tensor:
        """As many bytes as there are: memory that torch pins is a power of two."""
        blocks = empty_on_huge_pages(shape, torch.uint8)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0))
        weakref.finalize(self, cudart.cudaHostUnregister, blocks.data_ptr())
        return blocks

    def copier(self) -> Copier:
        """What copies, on this pool's device."""
        return CpuCopier(self) if self.pool.blocks.device.type == "cpu" else CudaCopier(self)

    def measure(self) -> float:
        """Bytes per second, there and back; the content of the KV pool stays."""
        ids = np.arange(1, min(MEASURED_BLOCKS, self.num_blocks, self.pool.num_blocks) + 1)
        copier = self.copier()
        copier.copy_out(ids, ids, copier.mark())
        copier.copy_in(ids, ids, copier.mark())  # all that a GPU loads when it is first asked for it, is there
        start = time.perf_counter()
        copier.copy_out(ids, ids, copier.mark())
        copier.copy_in(ids, ids, copier.mark())
        return 2 * len(ids) * self.pool.block_bytes / (time.perf_counter() - start)


class CpuCopier:
    """Without torch, whose threads the steps need; numpy lets other threads of Python run meanwhile."""

    def __init__(self, host: HostPool) -> None:
        self._host = host.blocks.numpy()
        self._pool = host.pool.blocks.numpy()

    def mark(self) -> object:
        """What was launched before is done: a CPU has no queue."""
        return None

    def copy_out(self, block_ids: NDArray[np.int64], host_block_ids: NDArray[np.int64], after: object) -> None:
        """See Copier."""
        for block_id, host_block_id in zip(block_ids, host_block_ids, strict=True):
            self._host[host_block_id] = self._pool[:, :, block_id]

    def copy_in(self, host_block_ids: NDArray[np.int64], block_ids: NDArray[np.int64], after: object) -> None:
        """See Copier."""
        for host_block_id, block_id in zip(host_block_ids, block_ids, strict=True):
            self._pool[:, :, block_id] = self._host[host_block_id]


class CudaCopier:
    """On a stream of its own, beside the steps. Moves words: kernels of torch move an element a thread."""

    def __init__(self, host: HostPool) -> None:
        self._host, self._pool = host.blocks.view(torch.int64), host.pool.blocks.view(torch.int64)
        device = self._pool.device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        num_layers, planes, _, *head = self._pool.shape
        self._staging = torch.empty((CHUNK_BLOCKS, num_layers, planes, *head), dtype=torch.int64, device=device)

    def mark(self) -> torch.cuda.Event:
        """See Copier."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def copy_out(self, block_ids: NDArray[np.int64], host_block_ids: NDArray[np.int64], after: object) -> None:
        """See Copier."""
        with self._behind(after):
            for first in range(0, len(block_ids), CHUNK_BLOCKS):
                ids = self._ids(block_ids[first : first + CHUNK_BLOCKS])
                staged = self._staging[: len(ids)]
                staged.copy_(self._pool.index_select(2, ids).movedim(2, 0))
                for i, host_block_id in enumerate(host_block_ids[first : first + CHUNK_BLOCKS].tolist()):
                    self._host[host_block_id].copy_(staged[i], non_blocking=True)

    def copy_in(self, host_block_ids: NDArray[np.int64], block_ids: NDArray[np.int64], after: object) -> None:
        """See Copier."""
        with self._behind(after):
            for first in range(0, len(block_ids), CHUNK_BLOCKS):
                ids = self._ids(block_ids[first : first + CHUNK_BLOCKS])
                staged = self._staging[: len(ids)]
                for i, host_block_id in enumerate(host_block_ids[first : first + CHUNK_BLOCKS].tolist()):
                    staged[i].copy_(self._host[host_block_id], non_blocking=True)
                self._pool.index_copy_(2, ids, staged.movedim(0, 2))

    @contextmanager
    def _behind(self, mark: object) -> Iterator[None]:
        assert isinstance(mark, torch.cuda.Event)
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._stream.wait_event(mark)
            yield
            self._stream.synchronize()

    def _ids(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(ids).to(self._pool.device)
