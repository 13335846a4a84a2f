"""What a load run was asked for: values only, checked when they are made. Raises LoadError that names the flag.

Flags and fields are named as `vllm bench serve` names them, where it has them. Times in seconds, lengths in tokens.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from tests.load.harness.errors import LoadError

BACKENDS = ("pagoda", "openai")
DATASETS = ("random", "lognormal", "sharegpt", "alpaca", "prefix_repetition", "conversation", "timed_trace")
METRICS = ("ttft", "tpot", "itl", "e2el")
SLO_METRICS = ("ttft", "tpot", "e2el")
RAMP_STRATEGIES = ("linear", "exponential")
MAX_PROCESSES = 64


def require(holds: bool, flag: str, value: object, rule: str) -> None:
    """Raises LoadError that names the flag where a rule does not hold."""
    if not holds:
        raise LoadError(f"--{flag} {value}: {rule}", 2)


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and how requests are to be sampled there."""

    backend: str = "pagoda"
    address: str = "127.0.0.1:50051"
    """host:port or unix:PATH of ours; the base URL of an OpenAI server."""
    model: str | None = None
    """An OpenAI server's name for its model; None: the first that it lists."""
    tokenizer: Path | None = None
    """A tokenizer.json. Prompts go to an OpenAI server as the text that it makes of their ids; None: as ids."""
    vocab_size: int | None = None
    """Prompts are drawn from the ids below; None: as the server says, or 1,000."""
    temperature: float | None = 0.0
    ignore_eos: bool = True
    stream_interval: int = 0
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require(self.backend in BACKENDS, "backend", self.backend, f"must be one of {', '.join(BACKENDS)}")
        require(self.vocab_size is None or self.vocab_size > 1, "vocab-size", self.vocab_size, "must be over 1")
        if self.tokenizer is not None:
            require(self.backend == "openai", "tokenizer", self.tokenizer, "goes with --backend openai")
            require(self.tokenizer.is_file(), "tokenizer", self.tokenizer, "no such file")
        require(self.request_timeout_s > 0, "request-timeout-s", self.request_timeout_s, "must be over 0")


@dataclass(frozen=True, slots=True)
class Ramp:
    """The request rate grows over the run, or from stage to stage."""

    strategy: str
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        names = ", ".join(RAMP_STRATEGIES)
        require(self.strategy in RAMP_STRATEGIES, "ramp-up-strategy", self.strategy, f"must be one of {names}")
        require(0 < self.start_rps < math.inf, "ramp-up-start-rps", self.start_rps, "must be over 0")
        require(
            self.start_rps <= self.end_rps < math.inf, "ramp-up-end-rps", self.end_rps, "must not be below the start"
        )

    def rate_at(self, progress: float) -> float:
        """Requests per second at a progress from 0 to 1."""
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)


@dataclass(frozen=True, slots=True)
class Pace:
    """When conversations begin. A request alone is a conversation of one turn."""

    num_prompts: int | None = None
    """None: 1,000, or as many as fill the duration, or all of a trace."""
    request_rate: float = math.inf
    """Conversations per second; inf: all at once, or as soon as one of `max_concurrency` is free."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the intervals: 1 is Poisson, below it come bursts, above it evenness."""
    max_concurrency: int | None = None
    duration_s: float | None = None
    """Nothing begins after it; the prompts are gone through again where they do not last as long."""
    ramp: Ramp | None = None

    def __post_init__(self) -> None:
        require(self.num_prompts is None or self.num_prompts > 0, "num-prompts", self.num_prompts, "must be over 0")
        require(self.request_rate > 0, "request-rate", self.request_rate, "must be over 0")
        require(0 < self.burstiness < math.inf, "burstiness", self.burstiness, "must be over 0")
        require(self.max_concurrency is None or self.max_concurrency > 0, "max-concurrency", self.max_concurrency,
                "must be over 0")  # fmt: skip
        require(self.duration_s is None or self.duration_s > 0, "duration-s", self.duration_s, "must be over 0")
        if self.ramp is not None:
            require(
                math.isinf(self.request_rate), "request-rate", self.request_rate, "a ramp sets the rate; leave it out"
            )
        is_endless = self.duration_s is not None and math.isinf(self.request_rate) and self.max_concurrency is None
        require(not is_endless, "duration-s", self.duration_s, "needs --request-rate or --max-concurrency")


@dataclass(frozen=True, slots=True)
class Leavers:
    """Shares of the requests that are cancelled, or whose client goes away, in the middle of the stream."""

    cancel_share: float = 0.0
    disconnect_share: float = 0.0
    after_tokens: int | None = None
    after_s: float | None = None

    def __post_init__(self) -> None:
        for flag, share in (("cancel-share", self.cancel_share), ("disconnect-share", self.disconnect_share)):
            require(0 <= share <= 1, flag, share, "must be 0 to 1")
        total = self.cancel_share + self.disconnect_share
        require(total <= 1, "disconnect-share", self.disconnect_share, "must be at most 1 with --cancel-share")
        has_moment = self.after_tokens is not None or self.after_s is not None
        require(total == 0 or has_moment, "cancel-share", total, "needs --leave-after-tokens or --leave-after-s")
        require(
            self.after_tokens is None or self.after_tokens > 0,
            "leave-after-tokens",
            self.after_tokens,
            "must be over 0",
        )
        require(self.after_s is None or self.after_s > 0, "leave-after-s", self.after_s, "must be over 0")


@dataclass(frozen=True, slots=True)
class Dataset:
    """What the requests ask for."""

    name: str = "random"
    path: Path | None = None
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float = 0.0
    """random: lengths are even over (1 - ratio) to (1 + ratio) times their mean."""
    length_sigma: float = 1.0
    """lognormal, sharegpt, alpaca, conversation: of the logarithm of the lengths."""
    prefix_len: int = 0
    """Tokens that requests share in front of their own."""
    num_prefixes: int = 1
    num_turns: int = 3
    """conversation: turns of each."""
    think_time_s: float = 1.0
    """conversation: mean of the exponential time from an answer to the next turn."""
    self_timed: bool = True
    """timed_trace: requests are due when the trace says, whatever the pace."""

    def __post_init__(self) -> None:
        require(self.name in DATASETS, "dataset-name", self.name, f"must be one of {', '.join(DATASETS)}")
        has_path = self.path is not None
        require(
            has_path == (self.name == "timed_trace"), "dataset-path", self.path, "goes with --dataset-name timed_trace"
        )
        for flag, length in (("input-len", self.input_len), ("output-len", self.output_len)):
            require(length is None or length > 0, flag, length, "must be over 0")
        require(0 <= self.range_ratio < 1, "random-range-ratio", self.range_ratio, "must be 0 to below 1")
        require(self.length_sigma >= 0, "length-sigma", self.length_sigma, "must be 0 or more")
        require(self.prefix_len >= 0, "random-prefix-len", self.prefix_len, "must be 0 or more")
        require(self.num_prefixes > 0, "prefix-repetition-num-prefixes", self.num_prefixes, "must be over 0")
        require(self.num_turns > 0, "num-turns", self.num_turns, "must be over 0")
        require(self.think_time_s >= 0, "think-time-s", self.think_time_s, "must be 0 or more")


@dataclass(frozen=True, slots=True)
class Knee:
    """Stages of a ramp, each at one rate, until goodput falls below a share of it."""

    goodput_share: float = 0.9
    stage_s: float = 20.0
    num_stages: int = 8

    def __post_init__(self) -> None:
        require(0 < self.goodput_share <= 1, "knee-share", self.goodput_share, "must be over 0, at most 1")
        require(self.stage_s > 0, "stage-s", self.stage_s, "must be over 0")
        require(self.num_stages > 1, "num-stages", self.num_stages, "must be over 1")


@dataclass(frozen=True, slots=True)
class Measures:
    """What is reported of the samples."""

    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
    goodput_ms: tuple[tuple[str, float], ...] = ()
    """What a request must keep to count as good: (metric, at most so many milliseconds)."""
    save_detailed: bool = False

    def __post_init__(self) -> None:
        for name in self.percentile_metrics:
            require(name in METRICS, "percentile-metrics", name, f"must be of {', '.join(METRICS)}")
        for percentile in self.metric_percentiles:
            require(0 <= percentile <= 100, "metric-percentiles", percentile, "must be 0 to 100")
        for name, limit_ms in self.goodput_ms:
            require(name in SLO_METRICS, "goodput", name, f"must be of {', '.join(SLO_METRICS)}")
            require(limit_ms >= 0, "goodput", f"{name}:{limit_ms}", "must be 0 or more")


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    target: Target = field(default_factory=Target)
    pace: Pace = field(default_factory=Pace)
    dataset: Dataset = field(default_factory=Dataset)
    leavers: Leavers = field(default_factory=Leavers)
    measures: Measures = field(default_factory=Measures)
    knee: Knee | None = None
    num_processes: int = 1
    num_warmups: int = 0
    status_interval_s: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 < self.num_processes <= MAX_PROCESSES,
            "num-processes",
            self.num_processes,
            f"must be 1 to {MAX_PROCESSES}",
        )
        require(self.num_warmups >= 0, "num-warmups", self.num_warmups, "must be 0 or more")
        require(self.status_interval_s > 0, "status-interval-s", self.status_interval_s, "must be over 0")
        require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        concurrency = self.pace.max_concurrency
        require(concurrency is None or concurrency >= self.num_processes, "num-processes", self.num_processes,
                "must not be over --max-concurrency")  # fmt: skip
        is_openai = self.target.backend == "openai"
        require(not (is_openai and self.leavers.cancel_share), "cancel-share", self.leavers.cancel_share,
                "an OpenAI server takes no cancel; use --disconnect-share")  # fmt: skip
        is_text_conversation = self.target.tokenizer is not None and self.dataset.name == "conversation"
        require(not is_text_conversation, "tokenizer", self.target.tokenizer,
                "a conversation goes on from the ids of its answers, which text does not bring back")  # fmt: skip
        if self.knee is not None:
            require(self.pace.ramp is not None, "find-knee", "", "needs --ramp-up-strategy, its start and its end")
            require(bool(self.measures.goodput_ms), "find-knee", "", "needs --goodput: what a request must keep")
