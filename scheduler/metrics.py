"""The scheduler in Prometheus's terms: what it measures, and what its workers' mirrors hold, at the moment it is asked.

Names and meanings are vLLM's where it has them, under the prefix pagoda. Changes nothing and keeps nothing: the
collector runs in the server's thread, and has the event loop make every snapshot.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.engine import Engine
from scheduler.fleet import Fleet, Slot
from scheduler.live_request import LiveRequests
from scheduler.redis_pipe import Pipe
from scheduler.request_metrics import RequestMetrics
from scheduler.tally import Tally

PREFIX = "pagoda:"
SNAPSHOT_TIMEOUT_S = 5.0
_BLOCK_STATES = ("free", "referenced", "cached")


@dataclass(frozen=True, slots=True)
class Measured:
    """What there is to show."""

    fleet: Fleet
    pipe: Pipe
    live_requests: LiveRequests
    requests: RequestMetrics


def serve_metrics(address: str, measured: Measured) -> Callable[[], None]:
    """GET /metrics at host:port, in a thread of its own; what ends it. Raises OSError where the address is taken."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_OnLoop(asyncio.get_running_loop(), measured))
    server, thread = start_http_server(int(port), host.strip("[]"), registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


class _OnLoop(Collector):
    """Collects on the event loop, where nothing changes meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, measured: Measured) -> None:
        self._loop = loop
        self._measured = measured

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of it."""

        async def snapshot() -> list[Metric]:
            return list(collect(self._measured))

        return asyncio.run_coroutine_threadsafe(snapshot(), self._loop).result(SNAPSHOT_TIMEOUT_S)


def collect(measured: Measured) -> Iterator[Metric]:
    """Every metric, by its name and meaning."""
    yield from _of_requests(measured)
    slots = sorted(measured.fleet.slots.values(), key=lambda slot: slot.name)
    engines = [(slot.name, slot.engine) for slot in slots if slot.engine is not None and not slot.engine.is_lost]
    yield from _of_workers(slots, engines)
    yield from _of_blocks(engines)
    yield from _of_steps(engines)
    yield _gauge("redis_round_trip_seconds", "Moving average of a script's round trip.", measured.pipe.round_trip_s)
    yield _gauge("redis_oldest_wait_seconds", "Age of the oldest unanswered script.", measured.pipe.oldest_wait_s)


def _of_requests(measured: Measured) -> Iterator[Metric]:
    requests = measured.requests
    for name, meaning, tally in (
        ("time_to_first_token_seconds", "From arrival to the first token in the log.", requests.time_to_first_token_s),
        ("inter_token_latency_seconds", "Between tokens of a choice in the log.", requests.inter_token_latency_s),
        ("request_time_per_output_token_seconds", "Mean of that, by choice.", requests.time_per_output_token_s),
        ("e2e_request_latency_seconds", "From arrival to the recorded end.", requests.e2e_latency_s),
        ("request_queue_time_seconds", "From arrival to the first admission.", requests.queue_time_s),
        ("request_prefill_time_seconds", "From admission to the first token.", requests.prefill_time_s),
        ("request_decode_time_seconds", "From the first token to the last, by choice.", requests.decode_time_s),
        ("request_prompt_tokens", "Tokens of prompts, by request.", requests.prompt_tokens),
        ("request_generation_tokens", "Tokens generated, by choice.", requests.generation_tokens),
    ):
        yield _histogram(name, meaning, tally)
    yield _counter("prompt_tokens", "Tokens of prompts whose first token has come.", requests.num_prompt_tokens)
    yield _counter("generation_tokens", "Tokens generated.", requests.num_generation_tokens)
    ended = CounterMetricFamily(PREFIX + "request_success", "Choices that have ended.", labels=["finished_reason"])
    for reason, count in sorted(requests.num_ended.items()):
        ended.add_metric([reason], count)
    yield ended
    refused = CounterMetricFamily(PREFIX + "request_errors", "Calls that failed.", labels=["status"])
    for status, count in sorted(requests.num_refused.items()):
        refused.add_metric([status], count)
    yield refused
    yield _gauge("live_requests", "Requests accepted and not ended.", len(measured.live_requests))
    yield _gauge("streams", "Streams being served.", measured.live_requests.num_streams)


def _of_workers(slots: list[Slot], engines: list[tuple[str, Engine]]) -> Iterator[Metric]:
    up = GaugeMetricFamily(PREFIX + "worker_up", "Whether the worker is live.", labels=["worker"])
    epoch = GaugeMetricFamily(PREFIX + "worker_epoch", "Epoch of its ownership.", labels=["worker"])
    for slot in slots:
        up.add_metric([slot.name], float(slot.engine is not None and not slot.engine.is_lost))
        epoch.add_metric([slot.name], slot.store.epoch)
    yield from (up, epoch)
    for name, meaning, value in (
        ("num_requests_running", "Sequences in the running batch.", lambda e: len(e.planner.running)),
        ("num_requests_waiting", "Sequences that wait for admission.", lambda e: e.planner.num_waiting),
        ("commits_in_flight", "Scripts that Redis has not answered.", lambda e: e.committer.num_in_flight),
        ("step_seconds_average", "Moving average of a step's time.", lambda e: e.clock.step_s),
    ):
        yield _by_worker(GaugeMetricFamily, name, meaning, engines, value)


def _of_blocks(engines: list[tuple[str, Engine]]) -> Iterator[Metric]:
    def usage(engine: Engine) -> float:
        return engine.planner.blocks.num_referenced_blocks / max(1, engine.planner.blocks.num_blocks)

    yield _by_worker(GaugeMetricFamily, "kv_cache_usage_perc", "Share of blocks in use, 0 to 1.", engines, usage)
    blocks = GaugeMetricFamily(PREFIX + "blocks", "Blocks by state.", labels=["worker", "state"])
    host_blocks = GaugeMetricFamily(PREFIX + "host_blocks", "Host blocks by state.", labels=["worker", "state"])
    for name, engine in engines:
        pool, host = engine.planner.blocks, engine.planner.swapper.host
        counts = (pool.num_free_blocks, pool.num_referenced_blocks, pool.num_cached_blocks)
        for state, count in zip(_BLOCK_STATES, counts, strict=True):
            blocks.add_metric([name, state], count)
        num_moving = host.num_blocks - host.num_free_blocks - host.num_cached_blocks
        for state, count in (
            ("free", host.num_free_blocks),
            ("moving", num_moving),
            ("cached", host.num_cached_blocks),
        ):
            host_blocks.add_metric([name, state], count)
    yield from (blocks, host_blocks)
    yield _by_worker(
        GaugeMetricFamily, "pinned_blocks", "Blocks that pins hold.", engines, lambda e: e.planner.pins.num_blocks
    )
    for name, meaning, value in (
        ("prefix_cache_queries", "Tokens looked up.", lambda e: e.planner.counters.num_prefix_query_tokens),
        ("prefix_cache_hits", "Tokens found.", lambda e: e.planner.counters.num_prefix_hit_tokens),
        ("prefix_cache_host_hits", "Tokens found on the host.", lambda e: e.planner.counters.num_host_hit_tokens),
        ("num_preemptions", "Preemptions.", lambda e: e.planner.counters.num_preemptions),
        ("evictions", "Cached blocks evicted.", lambda e: e.planner.history.num_evictions),
        ("blocks_swapped_out", "Blocks copied to the host.", lambda e: e.planner.swapper.num_blocks_out),
        ("blocks_swapped_in", "Blocks copied from the host.", lambda e: e.planner.swapper.num_blocks_in),
    ):
        yield _by_worker(CounterMetricFamily, name, meaning, engines, value)


def _of_steps(engines: list[tuple[str, Engine]]) -> Iterator[Metric]:
    for name, meaning, value in (
        ("steps", "Steps whose results were applied.", lambda e: e.num_steps),
        ("commits", "Scripts acknowledged by Redis.", lambda e: e.committer.num_commits),
    ):
        yield _by_worker(CounterMetricFamily, name, meaning, engines, value)
    phases = CounterMetricFamily(
        PREFIX + "step_phase_seconds", "CPU time of the loop by phase.", labels=["worker", "phase"]
    )
    plans = HistogramMetricFamily(PREFIX + "iteration_tokens_total", "Tokens of a plan.", labels=["worker"])
    sequences = HistogramMetricFamily(PREFIX + "plan_sequences", "Sequences of a plan.", labels=["worker"])
    for worker, engine in engines:
        for phase, seconds in engine.phase_s.items():
            phases.add_metric([worker, phase], seconds)
        plans.add_metric([worker], engine.plan_tokens.cumulative(), engine.plan_tokens.total)
        sequences.add_metric([worker], engine.plan_sequences.cumulative(), engine.plan_sequences.total)
    yield from (phases, plans, sequences)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, meaning, value=value)


def _histogram(name: str, meaning: str, tally: Tally) -> Metric:
    return HistogramMetricFamily(PREFIX + name, meaning, buckets=tally.cumulative(), sum_value=tally.total)


def _by_worker(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    meaning: str,
    engines: list[tuple[str, Engine]],
    value: Callable[[Engine], float],
) -> Metric:
    family = kind(PREFIX + name, meaning, labels=["worker"])
    for worker, engine in engines:
        family.add_metric([worker], value(engine))
    return family
