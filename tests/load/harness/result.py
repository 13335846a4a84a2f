"""A run's result: one JSON object with everything that the page and a comparison need. Knows its layout, no more."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.load.harness.errors import LoadError
from tests.load.harness.figures import (
    Json,
    Latencies,
    concurrency_by_second,
    histogram,
    summary,
    tokens_by_second,
)
from tests.load.harness.generator_figures import generator_figures
from tests.load.harness.machine import describe_machine
from tests.load.harness.records import Outcome, Record
from tests.load.harness.run import RawRun
from tests.load.harness.server_figures import server_figures
from tests.load.harness.settings import Settings

KIND = "pagoda load"
MAX_POINTS = 600
"""Requests that the page shows one by one: every so manieth where there are more."""


def run_result(run: RawRun, command: str) -> Json:
    """The result of one run."""
    records = run.records
    latencies = Latencies.of(records)
    result: Json = {
        **_head(run.settings, run.model.name, run.started_at_s, command),
        **summary(records, run.start_s, run.settings.measures),
        "is_interrupted": run.is_interrupted,
        "generator": generator_figures(run.generations, records),
        "server": server_figures(run.samples, run.start_s),
        "itl_histogram": histogram(latencies.itl),
        "ttft_histogram": histogram(latencies.ttft),
        "points": points(records, run.start_s),
        "output_tokens_by_second": tokens_by_second(records, run.start_s),
        "concurrency_by_second": concurrency_by_second(records, run.start_s),
        "failures": failures(records),
    }
    return result | (detail(records, run.start_s) if run.settings.measures.save_detailed else {})


def knee_result(settings: Settings, runs: Sequence[tuple[float, RawRun]], command: str) -> Json:
    """The result of a search for the knee: its stages, and the fastest whose goodput still kept its share."""
    knee, first = settings.knee, runs[0][1]
    assert knee is not None
    stages: list[dict[str, Any]] = [{"offered_rps": rate, **run_result(run, command)} for rate, run in runs]
    kept = [stage for stage in stages if stage["good_share"] >= knee.goodput_share]
    best = max(kept, key=lambda stage: stage["offered_rps"], default=None)
    return {
        **_head(settings, first.model.name, first.started_at_s, command),
        "knee_rps": best["offered_rps"] if best else None,
        "is_knee_beyond": len(kept) == len(stages),
        "knee_share": knee.goodput_share,
        "stages": stages,
    }


def _head(settings: Settings, model_name: str, started_at_s: float, command: str) -> Json:
    pace = settings.pace
    return {
        "kind": KIND,
        "date": datetime.fromtimestamp(started_at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "backend": settings.target.backend,
        "model_id": model_name,
        "num_prompts": pace.num_prompts,
        "request_rate": "inf" if math.isinf(pace.request_rate) else pace.request_rate,
        "burstiness": pace.burstiness,
        "max_concurrency": pace.max_concurrency,
        "command": command,
        "machine": describe_machine(),
        "settings": _plain(asdict(settings)),
    }


def _plain(value: Any) -> Any:
    """What JSON has: infinity and paths as text."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return value


def points(records: Sequence[Record], start_s: float) -> Json:
    """Columns by request: when it was due, its time to the first token (None: none came), how it went."""
    chosen = records[:: 1 + (len(records) - 1) // MAX_POINTS] if records else []
    return {
        "due_s": [round(r.due_s - start_s, 4) for r in chosen],
        "ttft_ms": [round(1e3 * r.ttft_s, 3) if r.chunk_times_s else None for r in chosen],
        "outcome": [r.outcome.value for r in chosen],
    }


def failures(records: Sequence[Record]) -> list[Json]:
    """By status: how many, the first one's own words, and what the server said of coming back."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.outcome is Outcome.FAILED:
            found.setdefault(record.status, []).append(record)
    rows: list[Json] = []
    for status, failed in sorted(found.items(), key=lambda item: -len(item[1])):
        delays_s = [r.retry_after_s for r in failed if r.retry_after_s is not None]
        rows.append(
            {
                "status": status,
                "count": len(failed),
                "detail": failed[0].detail,
                "with_retry_delay": len(delays_s),
                "mean_retry_delay_s": sum(delays_s) / len(delays_s) if delays_s else None,
            }
        )
    return rows


def detail(records: Sequence[Record], start_s: float) -> Json:
    """Columns by request, with --save-detailed; names as `vllm bench serve` has them, times in seconds."""
    gaps = [[b - a for a, b in zip(r.chunk_times_s, r.chunk_times_s[1:], strict=False)] for r in records]
    return {
        "input_lens": [r.num_prompt_tokens for r in records],
        "output_lens": [r.num_output_tokens for r in records],
        "ttfts": [r.ttft_s if r.chunk_times_s else None for r in records],
        "itls": gaps,
        "latencies": [r.e2el_s for r in records],
        "start_times": [r.due_s - start_s for r in records],
        "queue_times": [r.sent_s - r.due_s for r in records],
        "errors": [f"{r.status}: {r.detail}" if r.status else "" for r in records],
        "outcomes": [r.outcome.value for r in records],
    }


def write_result(result: Json, path: Path) -> None:
    """As JSON. Raises LoadError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from None


def read_result(path: Path) -> dict[str, Any]:
    """What write_result wrote. Raises LoadError."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: {error}", 2) from None
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise LoadError(f"{path}: is no result of pagoda load", 2)
    return result
