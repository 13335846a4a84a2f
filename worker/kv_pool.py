"""The physical KV pool: its size, its memory, and the poison that tests fill it with.

Owns the tensor. Which block belongs to whom is the scheduler's alone to say.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import LayerKV
from kernels.cpu.memory import empty_on_huge_pages, populate
from kernels.kv_format import NAN_BITS, NAN_BYTE, KVFormat
from worker.errors import ConfigError

# On a CPU the pool shares memory with everything else: a quarter of what is free, 1 GiB at most, unless a flag says so.
CPU_SHARE = 0.25
CPU_LIMIT_BYTES = 2**30
# On a GPU: of what is free after loading and profiling; the rest is left to the allocator's fragmentation.
GPU_SHARE = 0.92


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """What the flags ask for: bytes, or blocks, or neither (from free memory)."""

    kv_memory_bytes: int | None
    num_blocks: int | None


def block_bytes(num_layers: int, kv_format: KVFormat) -> int:
    """Bytes of one block over all layers, keys and values."""
    return num_layers * 2 * kv_format.num_kv_heads * kv_format.head_bytes


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that a pool takes by default, and that it can take at most."""

    default_bytes: int
    most_bytes: int


def count_blocks(request: PoolRequest, bytes_per_block: int, free: FreeMemory) -> int:
    """Usable blocks (the null block is not one of them) for `request`.

    Raises ConfigError where not one block fits, or more are asked for than memory holds.
    """
    if request.num_blocks is not None:
        pool_bytes, asked = (request.num_blocks + 1) * bytes_per_block, f"num-blocks={request.num_blocks}"
    else:
        pool_bytes = free.default_bytes if request.kv_memory_bytes is None else request.kv_memory_bytes
        asked = f"kv-memory={pool_bytes}"
    if pool_bytes > free.most_bytes:
        raise ConfigError(f"{asked}: takes {pool_bytes} bytes, {free.most_bytes} are free")
    num_blocks = pool_bytes // bytes_per_block - 1
    if num_blocks < 1:
        raise ConfigError(f"{asked}: holds no block beside the null block, one takes {bytes_per_block} bytes")
    return num_blocks


def free_cpu_memory() -> FreeMemory:
    """Of main memory."""
    known = [num_bytes for num_bytes in (_meminfo_available(), _cgroup_available()) if num_bytes is not None]
    available = min(known, default=4 * CPU_LIMIT_BYTES)  # not Linux: unknown, so the limit decides
    return FreeMemory(min(CPU_LIMIT_BYTES, int(CPU_SHARE * available)), available)


def free_gpu_memory(device: torch.device, activation_bytes: int) -> FreeMemory:
    """Of `device`, `activation_bytes` being what a step needs beside the pool."""
    torch.cuda.empty_cache()
    free_bytes = torch.cuda.mem_get_info(device)[0] - activation_bytes
    return FreeMemory(int(GPU_SHARE * free_bytes), free_bytes)


class KVPool:
    """num_blocks usable blocks, ids 1 to num_blocks, and the null block 0, whose content never counts.

    blocks: [num_layers, 2, num_blocks + 1, num_kv_heads, head_bytes] uint8, keys then values; not initialised.
    """

    def __init__(self, num_layers: int, num_blocks: int, kv_format: KVFormat, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.kv_format = kv_format
        self.block_bytes = block_bytes(num_layers, kv_format)
        shape = (num_layers, 2, num_blocks + 1, kv_format.num_kv_heads, kv_format.head_bytes)
        if device.type == "cpu":
            self.blocks = empty_on_huge_pages(shape, torch.uint8)
            populate(self.blocks.view(2 * num_layers, -1))  # else the steps that use a page first would wait for it
        else:
            self.blocks = torch.empty(shape, dtype=torch.uint8, device=device)
        self.layers = tuple(LayerKV(layer[0], layer[1]) for layer in self.blocks)

    def poison(self) -> None:
        """Fill the whole pool with NaN."""
        self.blocks.fill_(NAN_BYTE)

    def poison_block(self, block_id: int, first_slot: int) -> None:
        """Fill a block with NaN from `first_slot` on."""
        for plane in self.kv_format.slots(self.blocks, first_slot, self.kv_format.block_size):
            plane[..., block_id, :, :, :, :] = NAN_BITS


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_available() -> int | None:
    """What a container may still take, or None where nothing limits it."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
