"""How well the generators kept to their plan: a run that they could not keep up with measures them, not the server."""

from collections.abc import Sequence

import numpy as np

from tests.load.harness.figures import Json, Samples, number
from tests.load.harness.records import Generation, Record

MAX_LATE_MS = 20.0
MAX_LAG_MS = 20.0
MAX_CPU_SHARE = 0.9


def generator_figures(generations: Sequence[Generation], records: Sequence[Record]) -> Json:
    """Lateness of what was due by the schedule, lag of the event loops, share of a core; and what to make of them."""
    late_s = np.array([record.sent_s - record.due_s for record in records if record.is_paced and record.sent_s])
    lag_s = np.concatenate([np.frombuffer(g.loop_lags_s) for g in generations if g.loop_lags_s] or [np.array([])])
    cpu_share = max((g.cpu_s / max(g.wall_s, 1e-9) for g in generations), default=0.0)
    figures: Json = {
        "num_processes": len(generations),
        "cpu_share_of_the_busiest": cpu_share,
        "cpu_s": sum(g.cpu_s for g in generations),
        **_spread("late", late_s),
        **_spread("loop_lag", lag_s),
    }
    return figures | {"complaints": list(_complaints(figures))}


def _spread(name: str, samples_s: Samples) -> Json:
    samples_ms = 1e3 * samples_s if len(samples_s) else np.array([np.nan])
    return {
        f"mean_{name}_ms": number(np.mean(samples_ms)),
        f"p99_{name}_ms": number(np.percentile(samples_ms, 99)),
        f"max_{name}_ms": number(np.max(samples_ms)),
    }


def _complaints(figures: Json) -> "Sequence[str]":
    """Why the figures are not the server's alone; none where they are."""
    found = []
    late_ms, lag_ms, share = figures["p99_late_ms"], figures["p99_loop_lag_ms"], figures["cpu_share_of_the_busiest"]
    if isinstance(late_ms, float) and late_ms > MAX_LATE_MS:
        found.append(f"1 % of the requests were sent {late_ms:.0f} ms or more after they were due")
    if isinstance(lag_ms, float) and lag_ms > MAX_LAG_MS:
        found.append(f"a generator's loop was {lag_ms:.0f} ms or more behind for 1 % of the time")
    if isinstance(share, float) and share > MAX_CPU_SHARE:
        found.append(f"a generator took {share:.0%} of a core")
    return found
