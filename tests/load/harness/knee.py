"""The search for the knee: one rate after the other, until goodput falls below its share of what was offered."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tests.load.harness.figures import is_good
from tests.load.harness.run import RawRun
from tests.load.harness.settings import Pace, Settings


def stage_settings(settings: Settings) -> list[tuple[float, Settings]]:
    """(rate, settings) of each stage, ascending. Each has prompts of its own: none profits from an earlier one's."""
    knee, ramp = settings.knee, settings.pace.ramp
    assert knee is not None
    assert ramp is not None
    stages = []
    for number in range(knee.num_stages):
        rate = ramp.rate_at(number / (knee.num_stages - 1))
        pace = Pace(
            request_rate=rate,
            burstiness=settings.pace.burstiness,
            max_concurrency=settings.pace.max_concurrency,
            duration_s=knee.stage_s,
        )
        stages.append((rate, replace(settings, pace=pace, knee=None, seed=settings.seed + number)))
    return stages


async def find_knee(
    settings: Settings, run: Callable[[float, Settings], Awaitable[RawRun]]
) -> list[tuple[float, RawRun]]:
    """Runs stages up to the first that fails its share, or that is interrupted."""
    knee = settings.knee
    assert knee is not None
    found = []
    for rate, stage in stage_settings(settings):
        result = await run(rate, stage)
        found.append((rate, result))
        if result.is_interrupted or await asyncio.to_thread(good_share, result) < knee.goodput_share:
            break
    return found


def good_share(run: RawRun) -> float:
    """Of all requests that were due, those that kept every limit."""
    records, limits_ms = run.records, dict(run.settings.measures.goodput_ms)
    return sum(is_good(record, limits_ms) for record in records) / max(1, len(records))
