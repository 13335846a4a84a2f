"""From a checkpoint to a warm ModelRunner: device, dtype, weights, pool. Everything that needs torch at the start."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import AttentionShape, Kernels
from kernels.cuda.attention import CudaKernels
from kernels.reference import ReferenceKernels
from kernels.self_check import checked_kernels
from worker.config import WorkerConfig
from worker.errors import ConfigError
from worker.forward import EagerForward, Forward
from worker.graphs import CudaGraphRecorder, GraphForward, Recorder
from worker.host_pool import HostPool, count_host_blocks, free_host_memory
from worker.kv_pool import FreeMemory, KVPool, PoolRequest, block_bytes, count_blocks, free_cpu_memory, free_gpu_memory
from worker.link import Speed
from worker.model_runner import ModelRunner, PoisoningRunner, prefill_s_per_token, profile, warm_up
from worker.models.decoder import Decoder
from worker.models.spec import ModelSpec
from worker.runner import Runner
from worker.step import BatchLimits
from worker.swaps import NoSwaps, Reporter, Swaps, SwapThread
from worker.weights import load_weights

# By the flag's value; `auto` is the model's own.
KV_CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and its pool."""

    decoder: Decoder
    kernels: Kernels
    pool: KVPool
    host: HostPool | None


def load(config: WorkerConfig, spec: ModelSpec, model_dir: Path, max_model_len: int) -> Loaded:
    """Raises ConfigError and ModelError."""
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, spec.dtype, device)
    kernels = _kernels(config, spec, device, dtype)
    if config.dtype == "auto" and device.type == "cpu" and isinstance(kernels, ReferenceKernels):
        dtype = torch.float32  # torch alone multiplies it several times faster than bfloat16 on most CPUs
        kernels = _kernels(config, spec, device, dtype)
    decoder = Decoder(spec, load_weights(spec, model_dir, dtype, device), kernels, max_model_len)
    request = PoolRequest(config.kv_memory_bytes, config.num_blocks)
    bytes_per_block = block_bytes(spec.num_layers, kernels.kv_format)
    num_blocks = count_blocks(request, bytes_per_block, _free_memory(config, spec, kernels, decoder))
    pool = KVPool(spec.num_layers, num_blocks, kernels.kv_format, device)
    num_host_blocks = count_host_blocks(
        config.host_memory_bytes, config.num_host_blocks, bytes_per_block, free_host_memory(device)
    )
    return Loaded(decoder, kernels, pool, HostPool(num_host_blocks, pool) if num_host_blocks else None)


def kv_dtype_name(loaded: Loaded) -> str:
    """What workers must have in common: the model's dtype, and the pool's where that is another."""
    dtype, kv_dtype = (str(x).removeprefix("torch.") for x in (loaded.decoder.dtype, loaded.kernels.kv_format.dtype))
    return dtype if kv_dtype == dtype else f"{dtype}/{kv_dtype}"


def _kernels(config: WorkerConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Kernels:
    shape = AttentionShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=config.block_size,
        scale=spec.head_dim**-0.5,
        dtype=dtype,
        kv_dtype=KV_CACHE_DTYPES.get(config.kv_cache_dtype, dtype),
    )
    return checked_kernels(device, shape, spec.sliding_windows)


def _free_memory(config: WorkerConfig, spec: ModelSpec, kernels: Kernels, decoder: Decoder) -> FreeMemory:
    """On a GPU, what is left when the weights are there and the largest step has its share."""
    device = decoder.device
    if device.type == "cpu":
        return free_cpu_memory()
    null_block = KVPool(spec.num_layers, 0, kernels.kv_format, device)
    runner = ModelRunner(decoder, kernels, null_block, EagerForward(decoder, kernels, null_block))
    return free_gpu_memory(device, profile(runner, config.max_num_batched_tokens, config.block_size, device))


def start(config: WorkerConfig, loaded: Loaded, limits: BatchLimits) -> tuple[Speed, Runner]:
    """Warm the model up: how fast it is, and what will run the plans."""
    forward = _select_forward(config, loaded, limits)
    runner = ModelRunner(loaded.decoder, loaded.kernels, loaded.pool, forward)
    speed = Speed(warm_up(runner, config.block_size))
    if loaded.host is not None:
        s_per_token = prefill_s_per_token(runner, config.block_size, limits.max_num_batched_tokens)
        speed = replace(speed, s_per_token=s_per_token, swap_bytes_per_s=loaded.host.measure())
    return speed, PoisoningRunner(runner, loaded.pool) if config.poison_freed_blocks else runner


def swaps(loaded: Loaded, reporter: Reporter) -> Swaps:
    """What moves blocks between the pools."""
    if loaded.host is None:
        return NoSwaps()
    return SwapThread(loaded.host.copier(), loaded.pool.num_blocks, loaded.host.num_blocks, reporter)


def _select_forward(config: WorkerConfig, loaded: Loaded, limits: BatchLimits) -> Forward:
    """Graphs where the kernels and the device can record them."""
    eager = EagerForward(loaded.decoder, loaded.kernels, loaded.pool)
    recorder = None if config.enforce_eager else select_recorder(loaded.pool.blocks.device)
    if recorder is None or not isinstance(loaded.kernels, CudaKernels):
        return eager
    graphs = GraphForward(eager, limits)
    graphs.record(loaded.decoder, loaded.kernels, loaded.pool, recorder)
    return graphs


def select_recorder(device: torch.device) -> Recorder | None:
    """What records decode steps; None where a launch costs nothing, as on a CPU."""
    return CudaGraphRecorder() if device.type == "cuda" else None


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
