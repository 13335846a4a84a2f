"""The worker's loop: take a plan, apply it, launch it, report it. Runs on the main thread; the link's threads do I/O.

Beside an accelerator two steps are launched at most: while one runs, the loop reports the one before it, and launches
the next behind it as soon as its plan is there, so that the device need not wait for the host between them. A runner
that needs the processor itself has one at a time.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from worker.batch import Batch
from worker.errors import ProtocolError
from worker.ledger import Order
from worker.runner import Runner, RunningStep
from worker.step import Progress, Sampled, StepInputs
from worker.swaps import Swaps
from worker.wire import StepOutput


class PlanSource(Protocol):
    """Where plans come from and results go. A plan that was taken counts as begun."""

    def take(self) -> Order:
        """The next plan to run. Blocks; raises where the process must end."""

    def take_within(self, seconds: float) -> Order | None:
        """`take`, or None where none comes in time."""

    def finish(self, order: Order, output: StepOutput) -> None:
        """Report a plan that was taken and run."""

    def reject(self, order: Order, error: ProtocolError) -> None:
        """Give the plan that was taken back unrun, and end the stream it came by."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step on its way. start: when it was launched; whether its plan was there when the step before ended."""

    order: Order
    inputs: StepInputs
    step: RunningStep
    start: float
    is_back_to_back: bool


@dataclass(frozen=True, slots=True)
class _Ran:
    """A step without its report; seconds of the step, and of the gap before it."""

    launched: _Launched
    sampled: Sampled
    step_s: float
    gap_s: float


class Executor:
    """Runs plans in order for as long as the process lives."""

    def __init__(self, source: PlanSource, batch: Batch, runner: Runner, swaps: Swaps) -> None:
        self._source = source
        self._batch = batch
        self._runner = runner
        self._swaps = swaps
        self._registration = 0
        self._launched: deque[_Launched] = deque()
        self._unreported: _Ran | None = None
        self._last_end = time.perf_counter()

    def run(self) -> None:
        """Until the source raises."""
        while True:
            self._report()
            if not self._launched:
                self._launch(self._source.take(), is_back_to_back=False)
            elif len(self._launched) == 1 and (patience_s := self._launched[0].step.patience_s()) > 0:
                self._launch_within(patience_s)
            else:
                self._end()
                if not self._launched:
                    self._launch_within(0.0)

    def _launch_within(self, seconds: float) -> None:
        """The next plan, if it comes in time."""
        order = self._source.take_within(seconds)
        if order is not None:
            self._launch(order, is_back_to_back=True)

    def _launch(self, order: Order, is_back_to_back: bool) -> None:
        """Apply the plan and launch its step; a broken one is given back, after the report of what was launched."""
        if order.registration != self._registration:
            # After each registration the owner sends its sequences in full: what it does not send has ended.
            self._batch.clear()
            self._swaps.settle()
            self._registration = order.registration
        try:
            self._swaps.check(order.plan)
            inputs = self._batch.apply(order.plan)
        except ProtocolError as error:
            if self._launched:
                self._end()
            self._report()
            self._batch.clear()
            self._source.reject(order, error)
            return
        self._runner.prepare(order.plan)
        self._swaps.begin(order.plan)
        start = time.perf_counter()
        self._launched.append(_Launched(order, inputs, self._runner.launch(inputs), start, is_back_to_back))
        self._batch.begin(inputs)

    def _end(self) -> None:
        """Wait for the end of the oldest step, and commit it."""
        launched = self._launched.popleft()
        sampled = launched.step.wait()
        end = time.perf_counter()
        self._batch.commit(launched.inputs, sampled)
        start = max(launched.start, self._last_end)
        self._unreported = _Ran(launched, sampled, end - start, start - self._last_end)
        self._last_end = end

    def _report(self) -> None:
        ran, self._unreported = self._unreported, None
        if ran is not None:
            self._source.finish(ran.launched.order, _output(ran))


def _output(ran: _Ran) -> StepOutput:
    plan, progress = ran.launched.order.plan, Progress.of(ran.launched.inputs.scheduled, ran.sampled)
    return StepOutput(
        epoch=plan.epoch,
        step_id=plan.step_id,
        seq_ids=plan.scheduled_seq_ids,
        attempts=progress.attempts,
        num_computed_tokens=progress.num_computed_tokens,
        first_output_indexes=progress.first_output_indexes,
        num_tokens=progress.num_tokens,
        token_ids=progress.token_ids,
        failed_seq_ids=[plan.scheduled_seq_ids[i] for i in progress.failed.tolist()],
        step_s=ran.step_s,
        gap_s=ran.gap_s,
        back_to_back=ran.launched.is_back_to_back,
        candidates=progress.candidates,
        token_logprobs=progress.token_logprobs,
    )
