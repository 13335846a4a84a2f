"""What `pagoda up` was asked for, and the command line of each process that follows from it.

Pure but for looking at the machine: its cores, its memory, the model folder, whether the port is free.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.child import Command
from deploy.errors import DeployError

# Without a flag the CPU workers together take what a single one would.
_CPU_KV_SHARE, _CPU_KV_LIMIT_BYTES = 0.25, 2**30


@dataclass(frozen=True, slots=True)
class UpSettings:
    """One field per flag. None: the process's own default."""

    model: Path
    workers: int = 1
    device: str = "cpu"
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    kv_memory: str | None = None
    num_blocks: int | None = None
    host_memory: str | None = None
    num_host_blocks: int | None = None
    block_size: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    port: int | None = None
    """None: on the unix socket alone."""
    redis_url: str | None = None
    data: Path | None = None
    pids: Path | None = None
    record_ttl_s: int | None = None
    max_waiting: int | None = None
    overcommit: float | None = None
    preemption: str | None = None
    plan_ms: float | None = None
    pin_memory: str | None = None
    metrics_port: int | None = None
    """Of the scheduler's Prometheus endpoint; worker i has the (i + 1)th after it. None: there are none."""


def check(settings: UpSettings) -> None:
    """Raises DeployError for what can be seen before anything is started."""
    model = settings.model
    if not model.is_dir():
        raise DeployError(f"--model {model} is no folder; name one that holds a Hugging Face checkpoint", 2)
    for what, pattern in (("config.json", "config.json"), ("weights (*.safetensors)", "*.safetensors")):
        if not any(model.glob(pattern)):
            raise DeployError(f"--model {model} has no {what}; name a folder that holds a Hugging Face checkpoint", 2)
    if settings.workers < 1:
        raise DeployError(f"--workers {settings.workers}: must be at least 1", 2)
    if settings.kv_memory is not None and settings.num_blocks is not None:
        raise DeployError("--kv-memory and --num-blocks: give one of them", 2)
    if settings.host_memory is not None and settings.num_host_blocks is not None:
        raise DeployError("--host-memory and --num-host-blocks: give one of them", 2)
    if settings.preemption not in (None, "auto", "swap", "recompute"):
        raise DeployError(f"--preemption {settings.preemption}: must be auto, swap or recompute", 2)
    if settings.port is not None:
        _check_port("--port", settings.port)
    if settings.metrics_port is not None:
        for index in range(settings.workers + 1):
            _check_port("--metrics-port", settings.metrics_port + index)


def scheduler_command(settings: UpSettings, socket_path: Path, redis_url: str) -> Command:
    """`python -m scheduler` on the port for clients and on the unix socket for workers."""
    listen = [f"unix:{socket_path}"] + ([f"127.0.0.1:{settings.port}"] if settings.port is not None else [])
    flags: dict[str, object] = {
        "model": settings.model,
        "block-size": settings.block_size,
        "dtype": None if settings.kv_cache_dtype else settings.dtype,  # what the workers agree on
        "max-model-len": settings.max_model_len,
        "record-ttl-s": settings.record_ttl_s,
        "max-waiting": settings.max_waiting,
        "overcommit": settings.overcommit,
        "preemption": settings.preemption,
        "plan-ms": settings.plan_ms,
        "metrics-listen": _metrics_address(settings, 0),
        "pin-memory": None if settings.pin_memory is None else _bytes_of("--pin-memory", settings.pin_memory),
    }
    addresses = [part for address in listen for part in ("--listen", address)]
    argv = (sys.executable, "-m", "scheduler", *addresses, *_flags(flags))
    return Command("scheduler", argv, environment=(("REDIS_URL", redis_url),))  # it may hold a password


def worker_commands(settings: UpSettings, socket_path: Path) -> list[Command]:
    """`python -m worker`, once per worker, with its share of the cores and of the memory."""
    on_cpu = settings.device == "cpu"
    kv_memory = _kv_memory_share(settings) if on_cpu else settings.kv_memory
    commands = []
    for index in range(settings.workers):
        flags = {
            "model": settings.model,
            "scheduler": f"unix:{socket_path}",
            "name": f"worker-{index}",
            "device": f"cuda:{index}" if settings.device == "cuda" else settings.device,
            "dtype": settings.dtype,
            "kv-cache-dtype": settings.kv_cache_dtype,
            "block-size": settings.block_size,
            "num-blocks": settings.num_blocks,
            "kv-memory": kv_memory,
            "host-memory": settings.host_memory,
            "num-host-blocks": settings.num_host_blocks,
            "max-num-batched-tokens": settings.max_num_batched_tokens,
            "max-num-seqs": settings.max_num_seqs,
            "max-model-len": settings.max_model_len,
            "metrics-listen": _metrics_address(settings, index + 1),
            "num-threads": max(1, num_cores() // settings.workers) if on_cpu else None,
        }
        argv = (sys.executable, "-m", "worker", *_flags(flags))
        commands.append(Command(f"worker-{index}", argv, progress=" compiling "))
    return commands


def num_cores() -> int:
    """Cores that this process may use: hyperthreads count once, a container's quota is kept."""
    cpus = os.sched_getaffinity(0)
    topology = Path("/sys/devices/system/cpu")
    try:
        cores = {(topology / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}
    except OSError:
        cores = {str(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_quota()))


def _cpu_quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return sys.maxsize if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return sys.maxsize


def _kv_memory_share(settings: UpSettings) -> str | None:
    if settings.num_blocks is not None or settings.workers == 1:
        return settings.kv_memory
    if settings.kv_memory is not None:
        return str(_bytes_of("--kv-memory", settings.kv_memory) // settings.workers)
    return str(min(_CPU_KV_LIMIT_BYTES, int(_CPU_KV_SHARE * _available_bytes())) // settings.workers)


def _bytes_of(flag: str, text: str) -> int:
    from worker.config import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise DeployError(f"{flag}: {error}", 2) from None


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _flags(values: dict[str, object]) -> Iterator[str]:
    for name, value in values.items():
        if value is not None:
            yield f"--{name}"
            yield str(value)


def _metrics_address(settings: UpSettings, index: int) -> str | None:
    return None if settings.metrics_port is None else f"127.0.0.1:{settings.metrics_port + index}"


def _check_port(flag: str, port: int) -> None:
    if not 0 < port < 65536:
        raise DeployError(f"{flag} {port}: must be 1 to 65535", 2)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise DeployError(f"port {port} is in use; choose another with {flag}") from None
            raise DeployError(f"{flag} {port}: {error.strerror}; choose another") from None
