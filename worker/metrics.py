"""What a worker measures of its steps, in Prometheus's terms. What its blocks are and who runs is the scheduler's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from worker.errors import ConfigError
from worker.wire import StepOutput, SwapReport

PREFIX = "pagoda_worker:"
STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
GAP_S = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1, 1.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class WorkerMetrics:
    """Of one process, over all its incarnations."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._step_s = Histogram(PREFIX + "step_seconds", "Steps.", buckets=STEP_S, registry=self.registry)
        self._gap_s = Histogram(
            PREFIX + "gap_seconds", "Before steps whose plan was there.", buckets=GAP_S, registry=self.registry
        )
        self._sequences = Histogram(PREFIX + "step_sequences", "In a step.", buckets=SIZES, registry=self.registry)
        self._late = Counter(PREFIX + "late_plans", "Steps whose plan was not there in time.", registry=self.registry)
        self._tokens = Counter(PREFIX + "sampled_tokens", "Tokens sampled.", registry=self.registry)
        self._failed = Counter(PREFIX + "failed_sequences", "Logits that were not finite.", registry=self.registry)
        self._moved = Counter(PREFIX + "swapped_blocks", "Blocks swapped.", ["direction"], registry=self.registry)
        self._moved_s = Counter(PREFIX + "swap_seconds", "Time that swaps took.", registry=self.registry)
        self._registered = Gauge(PREFIX + "registered", "Whether a scheduler has it.", registry=self.registry)
        self._epoch = Gauge(PREFIX + "epoch", "Of the owner.", registry=self.registry)
        self._results = Gauge(PREFIX + "uncommitted_results", "Results kept until committed.", registry=self.registry)

    def listen(self, address: str) -> None:
        """GET /metrics at host:port, in a thread of its own. Raises ConfigError where the address is taken."""
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise ConfigError(f"metrics-listen={address}: {error}") from None

    def note_step(self, output: StepOutput, num_uncommitted: int) -> None:
        """A plan's steps have run."""
        for _ in range(output.num_steps):
            self._step_s.observe(output.step_s / output.num_steps)
            self._sequences.observe(len(output.seq_ids))
        if output.back_to_back:
            self._gap_s.observe(output.gap_s)
        else:
            self._late.inc()
        self._tokens.inc(len(output.token_ids))
        self._failed.inc(len(output.failed_seq_ids))
        self._results.set(num_uncommitted)

    def note_swaps(self, report: SwapReport) -> None:
        """Blocks have moved."""
        self._moved.labels("out").inc(len(report.host_block_ids))
        self._moved.labels("in").inc(len(report.block_ids))
        self._moved_s.inc(report.seconds)

    def note_owner(self, epoch: int) -> None:
        """A scheduler has taken the worker."""
        self._registered.set(1)
        self._epoch.set(epoch)

    def note_no_owner(self) -> None:
        """Its stream has ended."""
        self._registered.set(0)
