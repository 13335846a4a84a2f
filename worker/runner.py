"""What runs a step: the executor's view (`Runner`) and the one that only waits, for benchmarks without a model."""

import time
from typing import Protocol

import numpy as np

from worker.rng import draw, uniforms
from worker.step import Sampled, SampledRows, SampledSteps, StepInputs
from worker.wire import Plan


class RunningStep(Protocol):
    """A step on its way, or some at once."""

    def patience_s(self) -> float:
        """Seconds in which the caller may launch the next step behind it before it asks again; 0: it is to `wait`."""

    def wait(self) -> Sampled | SampledSteps:
        """What was sampled, once the step is done; or as many of the steps as could be run at once."""


class Runner(Protocol):
    """Holds the KV pool and computes steps on it."""

    def prepare(self, plan: Plan) -> None:
        """Do what a plan asks of the pool before its writes: copy blocks."""

    def launch(self, inputs: StepInputs) -> RunningStep:
        """Begin one step, which writes its KV and samples for its `sampled` rows; returns without waiting for it.

        One that is launched while another runs begins at its end, fed with what that samples; what is fed with the
        choice of a row whose logits were not finite counts as not finite either.
        """

    def launch_steps(self, inputs: StepInputs) -> RunningStep | None:
        """Begin decode steps, the first with `inputs`, each fed with what the one before samples; nothing else runs.

        As many as `inputs.steps_each` says. None where that gains nothing, or can't be: then each is to be launched by
        itself.
        """


class TimedRunner:
    """Waits instead of computing, one step after the other.

    Token ids are a function of (seed, output index), so any two runs agree, and none needs to be fed. So are their log
    probabilities, which are those of a random share.
    """

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._vocab_size = vocab_size
        self._end = 0.0

    def prepare(self, plan: Plan) -> None:
        """Nothing to copy."""

    def launch(self, inputs: StepInputs) -> "TimedStep":
        """See Runner."""
        self._end = max(self._end, time.perf_counter()) + self._step_s
        return TimedStep(self._end, inputs.sampled, self._vocab_size)

    def launch_steps(self, inputs: StepInputs) -> None:
        """See Runner."""


class TimedStep:
    """See RunningStep. Its caller has the processor to itself until the end, as beside an accelerator."""

    def __init__(self, end: float, rows: SampledRows, vocab_size: int) -> None:
        self._end = end
        self._rows = rows
        self._token_ids = (draw(rows.seeds, rows.output_indexes) % np.uint64(vocab_size)).astype(np.int64)

    def patience_s(self) -> float:
        """See RunningStep."""
        return self._end - time.perf_counter()

    def wait(self) -> Sampled:
        """See RunningStep."""
        time.sleep(max(0.0, self.patience_s()))
        is_finite = np.ones(len(self._token_ids), np.bool_)
        asked, rows = self._rows.reports_logprobs, self._rows
        if asked is None:
            return Sampled(self._token_ids, is_finite)
        logprobs = np.log1p(-uniforms(rows.seeds, rows.output_indexes)).astype(np.float32)
        return Sampled(self._token_ids, is_finite, logprobs=np.where(asked, logprobs, np.float32(0)))
