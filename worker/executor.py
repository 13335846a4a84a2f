"""The worker's loop: take a plan, apply it, run it, report it. Runs on the main thread; the link's threads do I/O."""

import time
from typing import Protocol

from worker.batch import Batch, Progress
from worker.errors import ProtocolError
from worker.ledger import Order
from worker.runner import Runner
from worker.wire import Plan, StepOutput


class PlanSource(Protocol):
    """Where plans come from and results go."""

    def take(self) -> Order:
        """The next plan to run, now being run. Blocks; raises WorkerError where the process must end."""

    def has_plan(self) -> bool:
        """Whether `take` would return at once."""

    def finish(self, order: Order, output: StepOutput) -> None:
        """Report the plan that was taken."""

    def reject(self, order: Order, error: ProtocolError) -> None:
        """Give the plan that was taken back unrun, and end the stream it came by."""


class Executor:
    """Runs plans in order, one at a time, for as long as the process lives."""

    def __init__(self, source: PlanSource, batch: Batch, runner: Runner) -> None:
        self._source = source
        self._batch = batch
        self._runner = runner
        self._registration = 0
        self._last_end = time.perf_counter()
        self._back_to_back = False

    def run(self) -> None:
        """Until the source raises."""
        while True:
            self.step(self._source.take())

    def step(self, order: Order) -> None:
        """Run one plan and report it."""
        plan = order.plan
        if order.registration != self._registration:
            # After each registration the owner sends its sequences in full: what it does not send has ended.
            self._batch.clear()
            self._registration = order.registration
        try:
            inputs = self._batch.apply(plan)
        except ProtocolError as error:
            self._batch.clear()
            self._source.reject(order, error)
            return
        self._runner.prepare(plan)
        start = time.perf_counter()
        sampled = self._runner.run(inputs)
        end = time.perf_counter()
        has_next = self._source.has_plan()
        progress = self._batch.commit(inputs, sampled)
        gap_s, back_to_back = start - self._last_end, self._back_to_back
        self._last_end, self._back_to_back = end, has_next
        self._source.finish(order, _output(plan, progress, (end - start, gap_s, back_to_back)))


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
