"""Two results side by side: each figure that both have, and the second over the first. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from tests.load.harness.settings import METRICS

Result = Mapping[str, Any]
COUNTS = ("num_requests", "completed", "failed", "cancelled", "disconnected")
RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "messages_per_s")
MIN_DIFFERENCE = 0.02
"""Ratios nearer to 1 say nothing on a machine that others share."""


def comparison_rows(first: Result, second: Result) -> list[list[str]]:
    """[figure, first, second, ratio and what it means]."""
    if "stages" in first and "stages" in second:
        return [_row("knee, requests/s", first["knee_rps"], second["knee_rps"], more_is_better=True)]
    return [row for row in _rows(first, second) if row[1:3] != ["-", "-"]]


def _rows(first: Result, second: Result) -> Iterator[list[str]]:
    for name in COUNTS:
        yield _row(name.replace("_", " "), first.get(name), second.get(name), more_is_better=None)
    for name in RATES:
        yield _row(name.replace("_", " "), first.get(name), second.get(name), more_is_better=True)
    for metric in METRICS:
        for key in (key for key in first if key.endswith(f"_{metric}_ms") and not key.startswith(("std", "median"))):
            yield _row(key.replace("_", " "), first[key], second.get(key), more_is_better=False)


def _row(name: str, first: float | None, second: float | None, more_is_better: bool | None) -> list[str]:
    return [name, _number(first), _number(second), _ratio(first, second, more_is_better)]


def _ratio(first: float | None, second: float | None, more_is_better: bool | None) -> str:
    if not first or second is None:
        return ""
    ratio = second / first
    if more_is_better is None:
        return f"{ratio:.2f}x"
    if abs(ratio - 1) < MIN_DIFFERENCE:
        return f"{ratio:.2f}x, alike"
    return f"{ratio:.2f}x, {'better' if (ratio > 1) == more_is_better else 'worse'}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) or value >= 1000 else f"{value:.4g}"
