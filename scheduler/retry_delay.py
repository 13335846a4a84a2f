"""When a client that found the queue full should come back: estimated from how fast places became free lately. Pure.

Every client that is refused is told a moment of its own: the k-th one that when k places will have become free. If all
keep to it, they come back at the pace at which they can be served, and not all at once.
"""

from collections import deque

WINDOW_S = 10.0
SAMPLE_INTERVAL_S = 0.1
MAX_DELAY_S = 30.0
"""Many of those that were refused never come back: the line of those that are told to is held no longer than this."""


class RetryDelay:
    """Owns the pace at which requests leave the queue, and the line of those told to come back."""

    def __init__(self) -> None:
        self._num_accepted = 0
        self._samples: deque[tuple[float, int]] = deque()  # (time, requests that had left the queue by then)
        self._last_told_s = 0.0

    def note(self, now_s: float, num_waiting: int) -> None:
        """A request has come, and finds so many waiting."""
        if not num_waiting or (self._samples and now_s - self._samples[-1][0] > WINDOW_S):
            self._samples.clear()  # while nobody waits, the pace is that of the arrivals
        if not self._samples or now_s - self._samples[-1][0] >= SAMPLE_INTERVAL_S:
            self._samples.append((now_s, self._num_accepted - num_waiting))
        while now_s - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def accept(self) -> None:
        """It has joined the queue."""
        self._num_accepted += 1

    def refuse(self, now_s: float, num_waiting: int) -> float | None:
        """It was noted, and has found no place: the seconds to tell it; None where no place became free lately."""
        since_s, num_left_then = self._samples[0]
        num_left = self._num_accepted - num_waiting - num_left_then
        if num_left <= 0 or now_s <= since_s:
            return None
        s_per_place = (now_s - since_s) / num_left
        self._last_told_s = min(max(self._last_told_s, now_s) + s_per_place, now_s + MAX_DELAY_S)
        return self._last_told_s - now_s
