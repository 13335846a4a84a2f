"""The worker's loop: take a plan, apply it, run it, report it. Runs on the main thread; the link's threads do I/O.

A result is reported once the next plan is applied, just before that runs (or at once, where no plan waits): the thread
that encodes and sends it then works in the shadow of the step, and not in the gap before it, where it would contend
for the interpreter.
"""

import time
from typing import Protocol

from worker.batch import Batch
from worker.errors import ProtocolError
from worker.ledger import Order
from worker.runner import Runner
from worker.step import Progress, StepInputs
from worker.wire import Plan, StepOutput


class PlanSource(Protocol):
    """Where plans come from and results go."""

    def take(self) -> Order:
        """The next plan to run, now being run. Blocks; raises where the process must end."""

    def poll(self) -> Order | None:
        """`take`, or None where it would block."""

    def has_plan(self) -> bool:
        """Whether `take` would return at once."""

    def finish(self, order: Order, output: StepOutput) -> None:
        """Report a plan that was taken and run."""

    def reject(self, order: Order, error: ProtocolError) -> None:
        """Give the plan that was taken back unrun, and end the stream it came by."""


class Executor:
    """Runs plans in order, one at a time, for as long as the process lives."""

    def __init__(self, source: PlanSource, batch: Batch, runner: Runner) -> None:
        self._source = source
        self._batch = batch
        self._runner = runner
        self._registration = 0
        self._unreported: tuple[Order, StepOutput] | None = None
        self._last_end = time.perf_counter()
        self._back_to_back = False

    def run(self) -> None:
        """Until the source raises."""
        while True:
            order = self._source.poll()
            if order is None:
                self._report()
                order = self._source.take()
            inputs = self._apply(order)
            self._report()
            if inputs is not None:
                self._unreported = (order, self._compute(order.plan, inputs))

    def _apply(self, order: Order) -> StepInputs | None:
        """What the plan runs; None where it is broken, and was given back."""
        if order.registration != self._registration:
            # After each registration the owner sends its sequences in full: what it does not send has ended.
            self._batch.clear()
            self._registration = order.registration
        try:
            return self._batch.apply(order.plan)
        except ProtocolError as error:
            self._batch.clear()
            self._report()
            self._source.reject(order, error)
            return None

    def _compute(self, plan: Plan, inputs: StepInputs) -> StepOutput:
        """Run one step, and record what it did."""
        self._runner.prepare(plan)
        start = time.perf_counter()
        sampled = self._runner.run(inputs)
        end = time.perf_counter()
        timing = (end - start, start - self._last_end, self._back_to_back)
        self._last_end, self._back_to_back = end, self._source.has_plan()
        return _output(plan, self._batch.commit(inputs, sampled), timing)

    def _report(self) -> None:
        if self._unreported is not None:
            self._source.finish(*self._unreported)
            self._unreported = None


def _output(plan: Plan, progress: Progress, timing: tuple[float, float, bool]) -> StepOutput:
    """timing: seconds of the step, seconds of the gap before it, whether its plan was there in time."""
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
        step_s=timing[0],
        gap_s=timing[1],
        back_to_back=timing[2],
    )
