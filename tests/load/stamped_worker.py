"""A worker that waits instead of computing, and whose tokens say when their step ended: for measuring what follows.

`python -m tests.load.stamped_worker` takes the flags of `python -m worker`. All tokens of a step are its end on the
monotonic clock, in units of TICK_S, modulo the vocabulary: who receives one knows how old it is, up to WRAP_S.
"""

import gc
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from worker.assemble import assemble
from worker.batch import Batch
from worker.config import parse_config
from worker.executor import Executor
from worker.link import Link
from worker.metrics import WorkerMetrics
from worker.runner import TimedRunner, TimedStep
from worker.step import Sampled, StepInputs

TICK_S = 0.0005
NUM_STAMPS = 4000
"""Ids that stamps may be; the demo model's tokenizer has a few more, of which the first is special."""
FIRST_STAMP = 8
WRAP_S = TICK_S * NUM_STAMPS


def ages_s(token_ids: npt.NDArray[np.int64], now_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How long before `now_s` the tokens' steps ended, if less than WRAP_S; half a tick too much or less."""
    ticks = now_s / TICK_S - (token_ids - FIRST_STAMP) - 0.5
    return np.maximum(0.0, np.mod(ticks + 1, NUM_STAMPS) - 1) * TICK_S


class StampedRunner(TimedRunner):
    """See the module."""

    def launch(self, inputs: StepInputs) -> "StampedStep":  # type: ignore[override]
        return StampedStep(super().launch(inputs), len(inputs.sampled.seeds))


class StampedStep:
    """See RunningStep."""

    def __init__(self, step: TimedStep, num_rows: int) -> None:
        self._step = step
        self._num_rows = num_rows

    def patience_s(self) -> float:
        return self._step.patience_s()

    def wait(self) -> Sampled:
        self._step.wait()
        stamp = FIRST_STAMP + int(time.monotonic() / TICK_S) % NUM_STAMPS
        return Sampled(np.full(self._num_rows, stamp, np.int64), np.ones(self._num_rows, np.bool_))


def main() -> None:
    """As worker.__main__, but for the runner."""
    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=lambda: (signal.sigwait(signals), os._exit(0)), daemon=True).start()
    config = parse_config(sys.argv[1:])
    assert config.timed_step_s is not None
    parts = assemble(config)
    parts = replace(parts, runner=StampedRunner(config.timed_step_s, NUM_STAMPS))
    gc.freeze()
    link = Link(config.schedulers, parts.description, WorkerMetrics())
    link.start()
    Executor(link, Batch(parts.limits), parts.runner, parts.swaps(link)).run()


if __name__ == "__main__":
    main()
