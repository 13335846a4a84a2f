"""From raw records to figures, named as `vllm bench serve` names its own. Pure; latencies count from when due.

TTFT and ITL are of every request that got a token, TPOT and end to end of those that completed. ITL is the time from
one message with tokens to the next: where messages hold several, `tokens_per_message` says so.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.load.harness.records import Outcome, Record
from tests.load.harness.settings import Measures

Samples = npt.NDArray[np.float64]
Json = dict[str, object]
HISTOGRAM_EDGES_MS = np.logspace(-2, 5, 141)
"""20 bins per decade, 10 us to 100 s."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Samples of each metric, seconds."""

    ttft: Samples
    tpot: Samples
    itl: Samples
    e2el: Samples

    @staticmethod
    def of(records: Sequence[Record]) -> "Latencies":
        """All samples of all records."""
        begun = [r for r in records if r.chunk_times_s]
        completed = [r for r in begun if r.outcome is Outcome.COMPLETED]
        gaps = [np.diff(np.frombuffer(r.chunk_times_s)) for r in begun]
        return Latencies(
            ttft=np.array([r.ttft_s for r in begun]),
            tpot=np.array([r.tpot_s for r in completed if r.num_output_tokens > 1]),
            itl=np.concatenate(gaps) if gaps else np.array([]),
            e2el=np.array([r.e2el_s for r in completed]),
        )


def is_good(record: Record, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request completed and kept every limit."""
    if record.outcome is not Outcome.COMPLETED or not record.chunk_times_s:
        return False
    return all(1e3 * getattr(record, f"{name}_s") <= limit_ms for name, limit_ms in limits_ms.items())


def summary(records: Sequence[Record], start_s: float, measures: Measures) -> Json:
    """The figures of a run."""
    outcomes = Counter(record.outcome for record in records)
    duration_s = max((r.end_s for r in records), default=start_s) - start_s
    duration_s = max(duration_s, 1e-9)
    num_completed = outcomes[Outcome.COMPLETED]
    num_input = sum(r.num_prompt_tokens for r in records if r.chunk_times_s)
    num_output = sum(r.num_output_tokens for r in records)
    num_good = sum(is_good(record, dict(measures.goodput_ms)) for record in records)
    has_slo = bool(measures.goodput_ms)
    figures: Json = {
        "duration": duration_s,
        "num_requests": len(records),
        "completed": num_completed,
        "failed": outcomes[Outcome.FAILED],
        "cancelled": outcomes[Outcome.CANCELLED],
        "disconnected": outcomes[Outcome.DISCONNECTED],
        "errors_by_status": dict(Counter(r.status for r in records if r.status).most_common()),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": num_completed / duration_s,
        "request_goodput": num_good / duration_s if has_slo else None,
        "good_share": num_good / max(1, len(records)) if has_slo else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "messages_per_s": sum(len(r.chunk_times_s) for r in records) / duration_s,
        "tokens_per_message": num_output / max(1, sum(len(r.chunk_times_s) for r in records)),
        "max_output_tokens_per_s": max(tokens_by_second(records, start_s), default=0),
        "max_concurrent_requests": max_concurrency(records),
    }
    return figures | latency_figures(Latencies.of(records), measures)


def latency_figures(latencies: Latencies, measures: Measures) -> Json:
    """mean, median, std and percentiles of each metric, milliseconds; None where there is no sample."""
    figures: Json = {}
    for metric in measures.percentile_metrics:
        samples_ms = 1e3 * getattr(latencies, metric)
        if not len(samples_ms):
            samples_ms = np.array([np.nan])
        figures[f"mean_{metric}_ms"] = number(np.mean(samples_ms))
        figures[f"median_{metric}_ms"] = number(np.median(samples_ms))
        figures[f"std_{metric}_ms"] = number(np.std(samples_ms))
        for percentile in measures.metric_percentiles:
            figures[f"p{percentile:g}_{metric}_ms"] = number(np.percentile(samples_ms, percentile))
    return figures


def number(value: "np.floating[npt.NBitBase] | float") -> float | None:
    """A float that JSON has: None for what is not a number."""
    return None if np.isnan(value) else float(value)


def tokens_by_second(records: Sequence[Record], start_s: float) -> list[int]:
    """Output tokens that came in each second since the start."""
    times = [np.frombuffer(r.chunk_times_s) for r in records if r.chunk_times_s]
    if not times:
        return []
    counts = np.concatenate([np.frombuffer(r.chunk_tokens, np.uint32) for r in records if r.chunk_times_s])
    seconds = np.maximum(0, (np.concatenate(times) - start_s).astype(np.int64))
    return [int(count) for count in np.bincount(seconds, weights=counts)]


def concurrency_by_second(records: Sequence[Record], start_s: float) -> list[int]:
    """Requests that were sent and had not ended, at each full second since the start."""
    last_s = max((r.end_s for r in records), default=start_s) - start_s
    seconds = np.arange(int(last_s) + 1) + start_s
    begun = np.searchsorted(np.sort([r.sent_s for r in records if r.sent_s]), seconds, "right")
    ended = np.searchsorted(np.sort([r.end_s for r in records if r.sent_s]), seconds, "right")
    return [int(count) for count in begun - ended]


def max_concurrency(records: Sequence[Record]) -> int:
    """Most requests that ran at once."""
    sent = [(r.sent_s, 1) for r in records if r.sent_s]
    ended = [(r.end_s, -1) for r in records if r.sent_s]
    steps = np.cumsum([step for _, step in sorted(sent + ended)])
    return int(steps.max(initial=0))


def histogram(samples_s: Samples) -> Json:
    """Counts over logarithmic bins, cut to those between the first and the last that has any."""
    counts, edges = np.histogram(
        np.clip(1e3 * samples_s, HISTOGRAM_EDGES_MS[0], HISTOGRAM_EDGES_MS[-1]), HISTOGRAM_EDGES_MS
    )
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {"edges_ms": [], "counts": []}
    first, last = int(filled[0]), int(filled[-1])
    return {
        "edges_ms": [float(f"{e:.6g}") for e in edges[first : last + 2]],
        "counts": counts[first : last + 1].tolist(),
    }
