"""Chooses the worker's objects from its settings, once, at the start: model or timer, device, dtype, pool."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pagoda.fingerprint import model_fingerprint

from worker.config import WorkerConfig
from worker.errors import ConfigError, ModelError
from worker.link import Description, PoolFacts, Speed
from worker.models.spec import read_spec
from worker.runner import Runner, TimedRunner
from worker.step import BatchLimits
from worker.swaps import NoSwaps, Reporter, Swaps
from worker.torch_start import import_torch

log = logging.getLogger("pagoda.worker")

TIMED_NUM_BLOCKS = 4096
TIMED_VOCAB_SIZE = 32000
TIMED_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything but the link."""

    runner: Runner
    limits: BatchLimits
    description: Description
    swaps: Callable[[Reporter], Swaps]
    """Made once it is known to whom they are reported."""


def assemble(config: WorkerConfig) -> Assembly:
    """Raises ConfigError and ModelError."""
    if config.timed_step_s is not None:
        return _assemble_timed(config, config.timed_step_s)
    assert config.model_dir is not None, "parse_config lets no worker pass without model or timer"
    return _assemble_model(config, config.model_dir)


def _assemble_timed(config: WorkerConfig, step_s: float) -> Assembly:
    """No torch, no weights; a model folder, where one is given, lends its identity and its vocabulary."""
    spec = read_spec(config.model_dir) if config.model_dir else None
    num_blocks = config.num_blocks or TIMED_NUM_BLOCKS
    limits = _limits(config, spec.max_position_embeddings if spec else TIMED_MAX_MODEL_LEN)
    description = Description(
        worker_name=config.name,
        model_fingerprint=_fingerprint(config.model_dir) if config.model_dir else "timed",
        limits=limits,
        pool=PoolFacts(kv_dtype="float32", num_blocks=num_blocks, block_bytes=1, num_layers=1),
        device="timed",
        poison_freed_blocks=False,
        speed=Speed(step_s),
    )
    runner = TimedRunner(step_s, spec.vocab_size if spec else TIMED_VOCAB_SIZE)
    return Assembly(runner, limits, description, lambda _: NoSwaps())


def _assemble_model(config: WorkerConfig, model_dir: Path) -> Assembly:
    started_s = time.perf_counter()
    spec = read_spec(model_dir)
    limits = _limits(config, spec.max_position_embeddings)
    fingerprint = _fingerprint(model_dir)

    # Imported only now: a bad flag or a bad config.json is told at once, not after torch's second.
    import_torch(config.device)
    import torch

    from worker import loading

    imported_s = time.perf_counter()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    loaded = loading.load(config, spec, model_dir, limits.max_model_len)
    speed, runner = loading.start(config, loaded, limits)
    dtype = loading.kv_dtype_name(loaded)
    log.info(
        "loaded %s as %s on %s: %d blocks of %d tokens, %.0f MiB; %.2f s to import, %.2f s to load, step %.1f ms",
        model_dir.name,
        dtype,
        loaded.pool.blocks.device,
        loaded.pool.num_blocks,
        config.block_size,
        loaded.pool.num_blocks * loaded.pool.block_bytes / 2**20,
        imported_s - started_s,
        time.perf_counter() - imported_s,
        speed.step_s * 1e3,
    )
    num_host_blocks = loaded.host.num_blocks if loaded.host else 0
    if num_host_blocks:
        log.info("%d host blocks, %.1f GB/s", num_host_blocks, speed.swap_bytes_per_s / 1e9)
    description = Description(
        worker_name=config.name,
        model_fingerprint=fingerprint,
        limits=limits,
        pool=PoolFacts(dtype, loaded.pool.num_blocks, loaded.pool.block_bytes, spec.num_layers, num_host_blocks),
        device=str(loaded.pool.blocks.device),
        poison_freed_blocks=config.poison_freed_blocks,
        speed=speed,
    )
    return Assembly(runner, limits, description, lambda reporter: loading.swaps(loaded, reporter))


def _limits(config: WorkerConfig, longest: int) -> BatchLimits:
    """`longest`: tokens of the model's longest sequence. Raises ConfigError for a length that it does not have.

    A pool smaller than one such sequence is fine: the scheduler knows its size and admits what fits.
    """
    wanted = config.max_model_len
    if wanted is not None and wanted > longest:
        raise ConfigError(f"max-model-len={wanted}: the model's longest sequence has {longest} tokens")
    return BatchLimits(
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=wanted if wanted is not None else longest,
    )


def _fingerprint(model_dir: Path) -> str:
    try:
        return model_fingerprint(model_dir)
    except OSError as error:
        raise ModelError(f"{error}: give --model a Hugging Face checkpoint with weights") from None
