"""What runs a step: the executor's view (`Runner`) and the one that only waits, for benchmarks without a model."""

import time
from typing import Protocol

import numpy as np

from worker.rng import draw
from worker.step import Sampled, SampledRows, StepInputs
from worker.wire import Plan


class RunningStep(Protocol):
    """A step on its way."""

    def patience_s(self) -> float:
        """Seconds in which the caller may do something else before it asks again; 0: it is to `wait`."""

    def wait(self) -> Sampled:
        """What was sampled, once the step is done."""


class Runner(Protocol):
    """Holds the KV pool and computes steps on it."""

    def prepare(self, plan: Plan) -> None:
        """Do what a plan asks of the pool before its writes: copy blocks."""

    def look_ahead(self, inputs: StepInputs) -> None:
        """While a step runs: `inputs` may be launched next. What does not depend on their token ids can be done now."""

    def launch(self, inputs: StepInputs) -> RunningStep:
        """Begin one step, which writes its KV and samples for its `sampled` rows; returns without waiting for it."""


class TimedRunner:
    """Waits instead of computing. Token ids are a function of (seed, output index), so any two runs agree."""

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._vocab_size = vocab_size

    def prepare(self, plan: Plan) -> None:
        """Nothing to copy."""

    def look_ahead(self, inputs: StepInputs) -> None:
        """Nothing to do."""

    def launch(self, inputs: StepInputs) -> "TimedStep":
        """See Runner."""
        return TimedStep(time.perf_counter() + self._step_s, inputs.sampled, self._vocab_size)


class TimedStep:
    """See RunningStep. Its caller has the processor to itself until the end, as beside an accelerator."""

    def __init__(self, end: float, rows: SampledRows, vocab_size: int) -> None:
        self._end = end
        self._token_ids = (draw(rows.seeds, rows.output_indexes) % np.uint64(vocab_size)).astype(np.int64)

    def patience_s(self) -> float:
        """See RunningStep."""
        return self._end - time.perf_counter()

    def wait(self) -> Sampled:
        """See RunningStep."""
        time.sleep(max(0.0, self.patience_s()))
        return Sampled(self._token_ids, np.ones(len(self._token_ids), np.bool_))
