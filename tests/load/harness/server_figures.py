"""What the server's own counters say of a run: before, during and after. Pure."""

from collections.abc import Sequence

from tests.load.harness.backend import ServerSample
from tests.load.harness.figures import Json


def server_figures(samples: Sequence[ServerSample], start_s: float) -> Json | None:
    """Differences, peaks and series; None where the server has no counters."""
    if len(samples) < 2:
        return None
    before, after = samples[0], samples[-1]
    grown = {name: after.totals[name] - before.totals[name] for name in after.totals}
    queried = grown.get("num_prefix_query_tokens", 0)
    return {
        "grown": grown,
        "prefix_hit_rate": grown["num_prefix_hit_tokens"] / queried if queried else None,
        "max_running": max(sample.num_running for sample in samples),
        "max_waiting": max(sample.num_waiting for sample in samples),
        "max_referenced_blocks": max(sample.blocks.get("referenced", 0) for sample in samples),
        "before": _moment(before, start_s),
        "after": _moment(after, start_s),
        "is_idle_after": after.num_live_requests == 0 and after.blocks.get("referenced", 0) == 0,
        "series": _series(samples, start_s),
    }


def _moment(sample: ServerSample, start_s: float) -> Json:
    return {
        "at_s": round(sample.at_s - start_s, 3),
        "num_running": sample.num_running,
        "num_waiting": sample.num_waiting,
        "num_live_requests": sample.num_live_requests,
        "num_streams": sample.num_streams,
        "blocks": sample.blocks,
    }


def _series(samples: Sequence[ServerSample], start_s: float) -> Json:
    """Columns by sample."""
    states = samples[-1].blocks
    return {
        "at_s": [round(sample.at_s - start_s, 3) for sample in samples],
        "num_running": [sample.num_running for sample in samples],
        "num_waiting": [sample.num_waiting for sample in samples],
        "blocks": {state: [sample.blocks.get(state, 0) for sample in samples] for state in states},
    }
