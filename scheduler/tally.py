"""A histogram that costs a step next to nothing: counts by bucket, of many equal values at once."""

from bisect import bisect_left
from collections.abc import Sequence


class Tally:
    """Of values in one unit; `bounds`: the upper ends of the buckets, the last of which has none."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times this value."""
        self._counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, values up to it) of each bucket, as Prometheus has them."""
        rows, num_values = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            num_values += count
            rows.append((bound, float(num_values)))
        return rows
