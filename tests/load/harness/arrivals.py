"""When conversations are due: an open loop's schedule, known before the run. Pure.

Due times depend on the settings and the seed alone, never on the server: what it does cannot slow its load down.
"""

import math

import numpy as np
import numpy.typing as npt

from tests.load.harness.settings import Pace

Times = npt.NDArray[np.float64]
DEFAULT_NUM_PROMPTS = 1000
_STREAM = 1
"""Tells the random numbers of arrivals from those of lengths and prompts."""


def due_times_s(pace: Pace, seed: int) -> Times | None:
    """Seconds from the start, ascending; None in a closed loop, where a request is due when a place is free.

    Intervals are gamma distributed; without a ramp they are scaled so that the mean rate is what was asked for.
    """
    is_closed = pace.ramp is None and math.isinf(pace.request_rate) and pace.max_concurrency is not None
    if is_closed:
        return None
    num_due = num_arrivals(pace)
    if pace.ramp is None and math.isinf(pace.request_rate):
        return np.zeros(num_due)
    progress = np.arange(num_due) / max(1, num_due - 1)
    ramp = pace.ramp
    rates = np.full(num_due, pace.request_rate) if ramp is None else np.array([ramp.rate_at(p) for p in progress])
    rng = np.random.default_rng([seed, _STREAM])
    due_s = np.cumsum(rng.gamma(pace.burstiness, 1 / (rates * pace.burstiness)))
    if ramp is None:
        due_s *= num_due / pace.request_rate / due_s[-1]
    return due_s if pace.duration_s is None else due_s[due_s <= pace.duration_s]


def num_arrivals(pace: Pace) -> int:
    """How many an open loop has: what was asked for, or as many as fill the duration."""
    if pace.num_prompts is None and pace.duration_s is not None and not math.isinf(pace.request_rate):
        return max(1, round(pace.request_rate * pace.duration_s))
    return pace.num_prompts or DEFAULT_NUM_PROMPTS
