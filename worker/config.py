"""The worker's settings: the only reader of its flags and environment. Imports neither torch nor numpy."""

import argparse
import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pagoda.logs import FORMATS

from worker.errors import ConfigError

BLOCK_SIZES = (16, 32)
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One field per flag; see `_parser` for what each means. Where a choice is left to the worker it is None."""

    schedulers: tuple[str, ...]
    name: str
    model_dir: Path | None
    device: str
    dtype: str
    kv_cache_dtype: str
    block_size: int
    kv_memory_bytes: int | None
    num_blocks: int | None
    host_memory_bytes: int | None
    num_host_blocks: int | None
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int | None
    num_threads: int | None
    timed_step_s: float | None
    enforce_eager: bool
    metrics_listen: str
    poison_freed_blocks: bool
    log_level: str
    log_format: str


def parse_config(argv: Sequence[str]) -> WorkerConfig:
    """The settings in `argv` (without the program's name) and the environment.

    Raises ConfigError that names the flag and the value.
    """
    flags = _parser().parse_args(argv)
    config = WorkerConfig(
        schedulers=tuple(flags.scheduler),
        name=flags.name,
        model_dir=flags.model,
        device=flags.device,
        dtype=flags.dtype,
        kv_cache_dtype=flags.kv_cache_dtype,
        block_size=flags.block_size,
        kv_memory_bytes=flags.kv_memory,
        num_blocks=flags.num_blocks,
        host_memory_bytes=flags.host_memory,
        num_host_blocks=flags.num_host_blocks,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        max_num_seqs=flags.max_num_seqs,
        max_model_len=flags.max_model_len,
        num_threads=flags.num_threads,
        timed_step_s=flags.timed_step_s,
        enforce_eager=flags.enforce_eager,
        metrics_listen=flags.metrics_listen,
        poison_freed_blocks=flags.poison_freed_blocks,
        log_level=os.environ.get("PAGODA_LOG_LEVEL", "INFO").upper(),
        log_format=os.environ.get("PAGODA_LOG_FORMAT", "text"),
    )
    _check(config)
    return config


def parse_bytes(text: str) -> int:
    """`512MiB`, `2GiB`, `1073741824` ... in bytes; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size: write 1073741824, 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see python -m worker --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m worker", description="Holds a KV pool and runs the step plans of a scheduler.")
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face checkpoint: config.json, *.safetensors")
    add("--scheduler", action="append", required=True, metavar="ADDRESS", help="host:port or unix:PATH; repeatable")
    add("--name", default=f"worker-{socket.gethostname()}", help="stable over restarts, unique (default %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's, but float32 for float16 on a CPU")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="auto: as --dtype; 8 bits hold twice as much")
    add("--block-size", type=int, default=16, help="tokens per KV block, 16 or 32 (default %(default)s)")
    add("--kv-memory", type=_bytes_flag, metavar="BYTES", help="KV pool, e.g. 2GiB (default: from free memory)")
    add("--num-blocks", type=int, help="KV pool in blocks, instead of --kv-memory")
    add("--host-memory", type=_bytes_flag, metavar="BYTES", help="host pool (default: 4GiB beside a GPU, else none)")
    add("--num-host-blocks", type=int, help="host pool in blocks, instead of --host-memory")
    add("--max-num-batched-tokens", type=int, default=2048, help="most tokens in a step (default %(default)s)")
    add("--max-num-seqs", type=int, default=256, help="most sequences in a step (default %(default)s)")
    add("--max-model-len", type=int, help="longest sequence in tokens (default: the model's, or what the pool holds)")
    add("--num-threads", type=int, help="CPU threads of one operation (default: torch's choice)")
    add("--timed-step-s", type=float, metavar="S", help="benchmarks: no model, each step waits S seconds")
    add("--enforce-eager", action="store_true", help="CUDA: launch kernel by kernel, without CUDA graphs")
    add("--metrics-listen", default="", metavar="HOST:PORT", help="Prometheus endpoint (default: none)")
    add("--poison-freed-blocks", action="store_true", help="tests: fill blocks that hold nothing with NaN")
    return parser


def _bytes_flag(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check(config: WorkerConfig) -> None:
    """Raise ConfigError for the first value that cannot be used."""
    if config.block_size not in BLOCK_SIZES:
        raise ConfigError(f"block-size={config.block_size}: must be 16 or 32")
    if not config.name or len(config.name) > 128 or re.search(r"[\s{}]", config.name):
        raise ConfigError(f"name={config.name!r}: must be 1 to 128 characters without spaces or braces")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ConfigError(f"device={config.device}: must be cpu, cuda or cuda:N")
    for address in config.schedulers:
        if not re.fullmatch(r"unix:.+|[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
            raise ConfigError(f"scheduler={address!r}: must be host:port or unix:PATH")
    if config.kv_memory_bytes is not None and config.num_blocks is not None:
        raise ConfigError(f"kv-memory={config.kv_memory_bytes} and num-blocks={config.num_blocks}: give one of them")
    if config.host_memory_bytes is not None and config.num_host_blocks is not None:
        raise ConfigError(
            f"host-memory={config.host_memory_bytes} and num-host-blocks={config.num_host_blocks}: give one of them"
        )
    if config.model_dir is None and config.timed_step_s is None:
        raise ConfigError("model: --model DIR is missing")
    if config.timed_step_s is not None and not (config.timed_step_s >= 0 and math.isfinite(config.timed_step_s)):
        raise ConfigError(f"timed-step-s={config.timed_step_s}: must be 0 or more seconds")
    if config.metrics_listen and not re.fullmatch(r"\S+:\d{1,5}", config.metrics_listen):
        raise ConfigError(f"metrics-listen={config.metrics_listen}: must be host:port")
    if config.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"PAGODA_LOG_LEVEL={config.log_level}: must be DEBUG, INFO, WARNING or ERROR")
    if config.log_format not in FORMATS:
        raise ConfigError(f"PAGODA_LOG_FORMAT={config.log_format}: must be one of {', '.join(FORMATS)}")
    _check_counts(config)


def _check_counts(config: WorkerConfig) -> None:
    counts = {
        "kv-memory": config.kv_memory_bytes,
        "num-blocks": config.num_blocks,
        "max-num-batched-tokens": config.max_num_batched_tokens,
        "max-num-seqs": config.max_num_seqs,
        "max-model-len": config.max_model_len,
        "num-threads": config.num_threads,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name}={count}: must be 1 or more")
    for name, count in (("host-memory", config.host_memory_bytes), ("num-host-blocks", config.num_host_blocks)):
        if count is not None and count < 0:
            raise ConfigError(f"{name}={count}: must be 0 or more")
