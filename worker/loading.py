"""From a checkpoint to a warm ModelRunner: device, dtype, weights, pool. Everything that needs torch at the start."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import AttentionShape, Kernels
from kernels.reference import ReferenceKernels
from kernels.self_check import checked_kernels
from worker.config import WorkerConfig
from worker.errors import ConfigError
from worker.kv_pool import FreeMemory, KVPool, PoolRequest, block_bytes, count_blocks, free_cpu_memory, free_gpu_memory
from worker.model_runner import ModelRunner, PoisoningRunner, profile, warm_up
from worker.models.decoder import Decoder
from worker.models.spec import ModelSpec
from worker.runner import Runner
from worker.weights import load_weights


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and its pool."""

    decoder: Decoder
    kernels: Kernels
    pool: KVPool


def load(config: WorkerConfig, spec: ModelSpec, model_dir: Path) -> Loaded:
    """Raises ConfigError and ModelError."""
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, spec.dtype, device)
    shape = AttentionShape(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, config.block_size, scale=spec.head_dim**-0.5
    )
    kernels = checked_kernels(device, shape, dtype, spec.sliding_windows)
    if config.dtype == "auto" and device.type == "cpu" and isinstance(kernels, ReferenceKernels):
        dtype = torch.float32  # torch alone multiplies it several times faster than bfloat16 on most CPUs
    decoder = Decoder(spec, load_weights(spec, model_dir, dtype, device), kernels)
    request = PoolRequest(config.kv_memory_bytes, config.num_blocks)
    bytes_per_block = block_bytes(spec, config.block_size, decoder.like.element_size())
    num_blocks = count_blocks(request, bytes_per_block, _free_memory(config, spec, kernels, decoder))
    return Loaded(decoder, kernels, KVPool.allocate(spec, config.block_size, num_blocks, like=decoder.like))


def _free_memory(config: WorkerConfig, spec: ModelSpec, kernels: Kernels, decoder: Decoder) -> FreeMemory:
    """On a GPU, what is left when the weights are there and the largest step has its share."""
    device = decoder.like.device
    if device.type == "cpu":
        return free_cpu_memory()
    null_block = KVPool.allocate(spec, config.block_size, 0, like=decoder.like)
    runner = ModelRunner(decoder, kernels, null_block)
    return free_gpu_memory(device, profile(runner, config.max_num_batched_tokens, config.block_size, device))


def start(config: WorkerConfig, loaded: Loaded) -> tuple[float, Runner]:
    """Warm the model up: seconds that a small step takes, and what will run the plans."""
    runner = ModelRunner(loaded.decoder, loaded.kernels, loaded.pool)
    calibrated_step_s = warm_up(runner, config.block_size)
    return calibrated_step_s, PoisoningRunner(runner, loaded.pool) if config.poison_freed_blocks else runner


def select_device(name: str) -> torch.device:
    """Raises ConfigError where it is not there."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name}: torch {torch.__version__} sees no CUDA device; use --device cpu")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device


def select_dtype(flag: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype; but on a CPU, where float16 gains nothing, its narrow range is not risked."""
    name = flag
    if flag == "auto":
        name = "float32" if device.type == "cpu" and checkpoint == "float16" else checkpoint
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
