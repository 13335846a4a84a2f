"""The worker's loop: take a plan, apply it, launch its steps, report it. Runs on the main thread; the link's threads do
I/O.

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
from worker.step import Progress, Sampled, SampledSteps, StepInputs
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
    """A step on its way, or some at once. start: when launched; whether the plan was there when the step before ended.

    num_steps: that the plan has left, this one included. has_begun: in the batch.
    """

    order: Order
    inputs: StepInputs
    step: RunningStep
    start: float
    is_back_to_back: bool
    num_steps: int
    has_begun: bool


@dataclass(frozen=True, slots=True)
class _Ran:
    """Steps without their report: when they began and ended, and the gap before them; seconds."""

    launched: _Launched
    sampled: Sampled | SampledSteps
    start: float
    end: float
    gap_s: float

    @property
    def num_steps(self) -> int:
        """How many."""
        return len(self.sampled) if isinstance(self.sampled, SampledSteps) else 1

    @property
    def is_last(self) -> bool:
        """Whether no step of their plan is left."""
        return self.num_steps == self.launched.num_steps

    def progress(self) -> Progress:
        """What they did."""
        scheduled = self.launched.inputs.scheduled
        if isinstance(self.sampled, SampledSteps):
            return Progress.of_steps(scheduled, self.sampled)
        return Progress.of(scheduled, self.sampled)


class Executor:
    """Runs plans in order for as long as the process lives."""

    def __init__(self, source: PlanSource, batch: Batch, runner: Runner, swaps: Swaps) -> None:
        self._source = source
        self._batch = batch
        self._runner = runner
        self._swaps = swaps
        self._registration = 0
        self._launched: deque[_Launched] = deque()
        self._ran: list[_Ran] = []  # steps of one plan, without its report
        self._rest: tuple[Order, int] | None = None  # a plan that has begun, how many steps it has left
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
        """The next step of the plan that has begun, or of the next plan, if it comes in time."""
        if self._rest is not None:
            order, num_left = self._rest
            return self._begin(order, self._batch.again(order.plan, order.plan.num_steps - num_left), True, num_left)
        order_in_time = self._source.take_within(seconds)
        if order_in_time is not None:
            self._launch(order_in_time, is_back_to_back=True)
        return None

    def _launch(self, order: Order, is_back_to_back: bool) -> None:
        """Apply the plan, launch its first step; a broken one is given back, after the report of what was launched."""
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
        self._begin(order, inputs, is_back_to_back, order.plan.num_steps)

    def _begin(self, order: Order, inputs: StepInputs, is_back_to_back: bool, num_steps: int) -> None:
        """Launch a step, or as many at once as the runner does, of the `num_steps` that the plan still has."""
        start = time.perf_counter()
        steps = None if self._launched else self._runner.launch_steps(inputs)
        step = self._runner.launch(inputs) if steps is None else steps
        self._launched.append(_Launched(order, inputs, step, start, is_back_to_back, num_steps, steps is None))
        self._rest = None
        if steps is None:
            self._batch.begin(inputs)
            self._leave(order, num_steps - 1)

    def _leave(self, order: Order, num_steps: int) -> None:
        """Steps of the plan that has begun are to be launched."""
        self._rest = (order, num_steps) if num_steps else None

    def _end(self) -> None:
        """Wait for the end of what was launched first, and commit it."""
        launched = self._launched.popleft()
        sampled = launched.step.wait()
        end = time.perf_counter()
        start = max(launched.start, self._last_end)
        ran = _Ran(launched, sampled, start, end, start - self._last_end)
        self._ran.append(ran)
        self._last_end = end
        if not launched.has_begun:
            self._leave(launched.order, launched.num_steps - ran.num_steps)
        if isinstance(sampled, SampledSteps):
            self._batch.commit_steps(launched.inputs, sampled)
            return
        if not launched.has_begun:
            self._batch.begin(launched.inputs)
        self._batch.commit(launched.inputs, sampled)

    def _report(self) -> None:
        if self._ran and self._ran[-1].is_last:
            ran, self._ran = self._ran, []
            self._source.finish(ran[0].launched.order, _output(ran))


def _output(ran: list[_Ran]) -> StepOutput:
    """Of all steps of a plan."""
    first, plan = ran[0], ran[0].launched.order.plan
    progress = Progress.joined([steps.progress() for steps in ran])
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
        step_s=ran[-1].end - first.start,
        gap_s=first.gap_s,
        back_to_back=first.launched.is_back_to_back,
        num_steps=sum(steps.num_steps for steps in ran),
        candidates=progress.candidates,
        token_logprobs=progress.token_logprobs,
    )
