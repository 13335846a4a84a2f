"""What runs a step: the executor's view (`Runner`) and the one that only waits, for benchmarks without a model."""

import time
from typing import Protocol

import numpy as np

from worker.rng import draw
from worker.step import Sampled, StepInputs
from worker.wire import Plan


class Runner(Protocol):
    """Holds the KV pool and computes steps on it."""

    def prepare(self, plan: Plan) -> None:
        """Do what a plan asks of the pool before its writes: copy blocks."""

    def run(self, inputs: StepInputs) -> Sampled:
        """Compute one step and wait for it: write its KV, sample for its `sampled` rows."""


class TimedRunner:
    """Waits instead of computing. Token ids are a function of (seed, output index), so any two runs agree."""

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._vocab_size = vocab_size

    def prepare(self, plan: Plan) -> None:
        """Nothing to copy."""

    def run(self, inputs: StepInputs) -> Sampled:
        """See Runner."""
        end = time.perf_counter() + self._step_s
        rows = inputs.sampled
        token_ids = (draw(rows.seeds, rows.output_indexes) % np.uint64(self._vocab_size)).astype(np.int64)
        time.sleep(max(0.0, end - time.perf_counter()))
        return Sampled(token_ids, np.ones(len(token_ids), np.bool_))
