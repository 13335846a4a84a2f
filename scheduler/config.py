"""The scheduler's flags: the only place that reads them. A bad value stops the start with its name."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagoda.logs import FORMATS

from scheduler.swap_ahead import Preemption

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class ConfigError(Exception):
    """A flag, or what it names, is not usable; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Times in seconds, lengths in tokens."""

    model_dir: Path
    listen: tuple[str, ...]
    redis_url: str
    block_size: int = 16
    kv_dtype: str = "auto"
    """"auto": that of the first worker that registers."""
    max_model_len: int = 0
    """0: what the model's config.json says."""
    max_waiting: int = 4096
    """Requests that may wait at once, over all workers; more are refused with RESOURCE_EXHAUSTED."""
    record_ttl_s: int = 600
    """How long a finished request stays readable."""
    request_ttl_s: int = 86_400
    """Longest life of a request."""
    lease_s: float = 3.0
    """Silence after which a worker is declared dead."""
    worker_wait_s: float = 60.0
    """How long requests wait while no worker is there, and streams while Redis is away."""
    overcommit: float = 1.0
    """Share of a pool that the expected peak of its batch may reach; over 1 accepts preemptions."""
    plan_ms: float = 15.0
    """Steps are planned together where the first one's tokens need wait no longer for the last one's, or four times as
    long where all streams gather tokens; 0: never. Whoever comes waits for the plan that runs and the one ahead."""
    preemption: Preemption = Preemption.AUTO
    """What becomes of a preempted sequence's blocks, where its worker has a host pool."""
    pin_memory_bytes: int | None = None
    """KV memory of each worker that pinned prefixes may hold; None: a quarter of its pool."""
    metrics_listen: str = ""
    """host:port of the Prometheus endpoint; empty: none."""
    log_level: str = "INFO"
    log_format: str = "text"

    def max_pinned_blocks(self, num_blocks: int, block_bytes: int) -> int:
        """Of a worker with so many blocks."""
        return num_blocks // 4 if self.pin_memory_bytes is None else self.pin_memory_bytes // max(1, block_bytes)

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32):
            raise ConfigError(f"--block-size={self.block_size}: must be 16 or 32")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"PAGODA_LOG_LEVEL={self.log_level}: must be one of {', '.join(LOG_LEVELS)}")
        if self.log_format not in FORMATS:
            raise ConfigError(f"PAGODA_LOG_FORMAT={self.log_format}: must be one of {', '.join(FORMATS)}")
        if not self.redis_url:
            raise ConfigError("--redis-url: name a Redis, or set REDIS_URL")
        if not self.listen:
            raise ConfigError("--listen: name at least one address")
        for name in ("max_waiting", "record_ttl_s", "request_ttl_s", "lease_s", "worker_wait_s", "overcommit"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')}={value}: must be over 0")
        if self.pin_memory_bytes is not None and self.pin_memory_bytes < 0:
            raise ConfigError(f"--pin-memory={self.pin_memory_bytes}: must be 0 or more")
        if not 0 <= self.plan_ms <= 1000:
            raise ConfigError(f"--plan-ms={self.plan_ms}: must be 0 to 1000")
        if self.metrics_listen and not re.fullmatch(r"\S+:\d{1,5}", self.metrics_listen):
            raise ConfigError(f"--metrics-listen={self.metrics_listen}: must be host:port")
        if self.max_model_len < 0:
            raise ConfigError(f"--max-model-len={self.max_model_len}: must be over 0")


def parse_flags(argv: Sequence[str]) -> SchedulerConfig:
    """Reads the command line of `python -m scheduler`; argparse ends the process with 2 on an unknown flag."""
    parser = argparse.ArgumentParser(prog="scheduler", description="Pagoda's scheduler service")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--listen", action="append", default=[], metavar="HOST:PORT|unix:PATH")
    parser.add_argument("--redis-url", default=os.environ.get("REDIS_URL", ""), metavar="URL", help="or $REDIS_URL")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--max-model-len", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--max-waiting", type=int, default=4096, metavar="REQUESTS")
    parser.add_argument("--record-ttl-s", type=int, default=600, metavar="S")
    parser.add_argument("--request-ttl-s", type=int, default=86_400, metavar="S")
    parser.add_argument("--lease-s", type=float, default=3.0, metavar="S")
    parser.add_argument("--worker-wait-s", type=float, default=60.0, metavar="S")
    parser.add_argument("--overcommit", type=float, default=1.0, metavar="SHARE")
    parser.add_argument("--plan-ms", type=float, default=15.0, metavar="MS")
    parser.add_argument("--preemption", default="auto", choices=[preemption.value for preemption in Preemption])
    parser.add_argument("--pin-memory", type=int, metavar="BYTES", dest="pin_memory_bytes")
    parser.add_argument("--metrics-listen", default="", metavar="HOST:PORT")
    flags = vars(parser.parse_args(argv))
    return SchedulerConfig(
        log_level=os.environ.get("PAGODA_LOG_LEVEL", "INFO").upper(),
        log_format=os.environ.get("PAGODA_LOG_FORMAT", "text"),
        model_dir=flags.pop("model"),
        listen=tuple(flags.pop("listen")),
        kv_dtype=flags.pop("dtype"),
        preemption=Preemption(flags.pop("preemption")),
        **flags,
    )
