"""How long steps take and should take: the pace for reservations, and the deadline that a step must not exceed."""

from collections import deque
from time import monotonic

MIN_DEADLINE_S = 2.0
DEADLINE_FACTOR = 3.0
NUM_CALIBRATION_STEPS = 8
"""Results before which a step's time can't be foretold."""
UNCALIBRATED_DEADLINE_S = 60.0
NUM_KEPT_GAPS = 4096
MAX_LATE_GAP_S = 0.05
"""A worker that waited for longer had nothing to do; one that waited for less, for a plan that came late."""
LATE_SHARE = 0.1
"""Share of late plans from which on another one is sent ahead; they fade over some hundred steps."""
MIN_VARIANCE = 64.0
"""Of the tokens of the last steps, squared: below it their times tell nothing of what one token more takes."""


class StepClock:
    """Of one worker. Times in seconds."""

    def __init__(self, calibrated_step_s: float = 0.0, calibrated_s_per_token: float = 0.0) -> None:
        self.step_s = calibrated_step_s
        """Moving average of a step's time, as the worker measured it."""
        self.marginal_s_per_token = calibrated_s_per_token
        """What one token more adds to a step: the slope of the last steps' times over their tokens."""
        self._s_per_token = 0.0
        self._mean_tokens = self._mean_s = self._variance = self._covariance = 0.0
        self._num_results = 0
        self._gaps_s: deque[float] = deque(maxlen=NUM_KEPT_GAPS)
        self._back_to_back: deque[bool] = deque(maxlen=NUM_KEPT_GAPS)
        self._late_share = 0.0
        self._in_flight: deque[tuple[int, int]] = deque()  # of each plan: tokens, steps
        self._head_since = 0.0
        self.last_heard = monotonic()

    def on_plan(self, num_tokens: int, num_steps: int = 1) -> None:
        """A plan has left. num_tokens: of all its steps."""
        if not self._in_flight:
            self._head_since = monotonic()
        self._in_flight.append((num_tokens, num_steps))

    def on_result(self, step_s: float, gap_s: float, back_to_back: bool) -> None:
        """A result has come. step_s: of one step."""
        self._back_to_back.append(back_to_back)
        self._gaps_s.append(gap_s)
        is_late = not back_to_back and gap_s < MAX_LATE_GAP_S
        self._late_share += (0.05 if is_late else 0.005) * (is_late - self._late_share)
        self.last_heard = self._head_since = monotonic()
        self._num_results += 1
        weight = max(0.1, 1 / self._num_results)
        self.step_s += weight * (step_s - self.step_s)
        if self._in_flight:
            num_tokens, num_steps = self._in_flight.popleft()
            self._s_per_token += weight * (step_s * num_steps / max(1, num_tokens) - self._s_per_token)
            self._fit_slope(num_tokens / num_steps, step_s, max(0.02, 1 / self._num_results))

    def _fit_slope(self, num_tokens: float, step_s: float, weight: float) -> None:
        more_tokens, more_s = num_tokens - self._mean_tokens, step_s - self._mean_s
        self._mean_tokens += weight * more_tokens
        self._mean_s += weight * more_s
        self._variance = (1 - weight) * (self._variance + weight * more_tokens * more_tokens)
        self._covariance = (1 - weight) * (self._covariance + weight * more_tokens * more_s)
        if self._variance > MIN_VARIANCE and self._covariance > 0:
            self.marginal_s_per_token = self._covariance / self._variance

    def on_heartbeat(self) -> None:
        """The worker lives."""
        self.last_heard = monotonic()

    def excuse(self, stalled_s: float) -> None:
        """The scheduler itself did not run for so long: what the worker sent meanwhile has not been read yet."""
        self.last_heard += stalled_s
        self._head_since += stalled_s

    @property
    def num_plans_ahead(self) -> int:
        """Plans to be there beside the one that runs: one, or two where one has often come too late."""
        return 2 if self._late_share > LATE_SHARE else 1

    def gap_s(self, share: float) -> float:
        """The gap that `share` of the last steps did not exceed, seconds."""
        gaps = sorted(self._gaps_s)
        return gaps[min(len(gaps) - 1, int(share * len(gaps)))] if gaps else 0.0

    @property
    def back_to_back(self) -> float:
        """Share of the last steps whose plan was there in time."""
        return sum(self._back_to_back) / max(1, len(self._back_to_back))

    def overdue_s(self) -> float:
        """Seconds by which the running step exceeds max(2 s, 3 x its predicted time); 0 where it does not.

        The first steps, before there is a prediction, have a minute.
        """
        if not self._in_flight:
            return 0.0
        num_tokens, num_steps = self._in_flight[0]
        predicted_s = max(num_steps * self.step_s, self._s_per_token * num_tokens)
        is_calibrated = self._num_results >= NUM_CALIBRATION_STEPS
        allowed_s = max(MIN_DEADLINE_S if is_calibrated else UNCALIBRATED_DEADLINE_S, DEADLINE_FACTOR * predicted_s)
        return max(0.0, monotonic() - self._head_since - allowed_s)
