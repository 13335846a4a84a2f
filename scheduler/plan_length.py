"""How many steps of decodes one plan has: each plan costs the scheduler, Redis and the worker the same, however long.

What it delays limits it. Tokens of its first step wait for those of its last, where somebody waits for them; and who
comes to join waits for the plan that runs and the one ahead.
"""

MAX_STEPS_PER_PLAN = 16
"""Behind the end of a sequence, so many less one may be run in vain."""
MAX_PATIENCE = 4
"""So many times as long a plan may take for streams that all take many tokens together."""
WEIGHT = 0.3
"""Of the last plan in the averages."""


class PlanLength:
    """Of one worker's plans. Times in seconds."""

    def __init__(self, plan_s: float, calibrated_step_s: float) -> None:
        """plan_s: how long the tokens of a plan's first step may wait; calibrated_step_s: a step of one token, or 0."""
        self._plan_s = plan_s
        self._step_s = calibrated_step_s
        self._num_sequences = 1.0

    def on_decodes(self, num_sequences: float, step_s: float) -> None:
        """Steps of one token of each sequence have run; how many and how long they were on average."""
        weight = WEIGHT if self._step_s else 1.0
        self._step_s += weight * (step_s - self._step_s)
        self._num_sequences += weight * (num_sequences - self._num_sequences)

    def num_steps(self, num_sequences: int, patience: int) -> int:
        """Of the next plan, where it may have more than one.

        patience: tokens for which whoever reads them waits in any case, from one delta to the next.
        """
        if not self._step_s:
            return 1
        # More sequences take no more than so many times as long, less of them no longer.
        step_s = self._step_s * max(1.0, num_sequences / self._num_sequences)
        num_in_time, num_at_most = (1 + int(n * self._plan_s / step_s) for n in (1, MAX_PATIENCE))
        return min(MAX_STEPS_PER_PLAN, max(num_in_time, min(num_at_most, patience)))
