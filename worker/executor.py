"""The worker's loop: take a plan, apply it, run it, report it. Runs on the main thread; the link's threads do I/O.

Between two steps only what needs the tokens of the first is done. While a step runs, the loop reports the one before
it and applies the plan of the next, as soon as that is there.
"""

import time
from dataclasses import dataclass
from typing import Protocol

from worker.batch import Batch
from worker.errors import ProtocolError
from worker.ledger import Order
from worker.runner import Runner, RunningStep
from worker.step import Progress, Sampled, Scheduled, StepInputs
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
class _Applied:
    """A plan whose changes the batch has made, and what it runs."""

    order: Order
    inputs: StepInputs


@dataclass(frozen=True, slots=True)
class _Ran:
    """A step without its report. Seconds of the step, of the gap before it; whether its plan was there in time."""

    order: Order
    scheduled: Scheduled
    sampled: Sampled
    step_s: float
    gap_s: float
    back_to_back: bool


class Executor:
    """Runs plans in order, one at a time, for as long as the process lives."""

    def __init__(self, source: PlanSource, batch: Batch, runner: Runner) -> None:
        self._source = source
        self._batch = batch
        self._runner = runner
        self._registration = 0
        self._unreported: _Ran | None = None
        self._last_end = time.perf_counter()

    def run(self) -> None:
        """Until the source raises."""
        following: _Applied | None = None
        while True:
            applied, was_there = following, following is not None
            if applied is None:
                self._report()
                applied = self._apply(self._source.take())
            following = None if applied is None else self._run(applied, was_there)

    def _run(self, applied: _Applied, is_back_to_back: bool) -> _Applied | None:
        """Run one step; the plan that is there at its end."""
        order, inputs = applied.order, applied.inputs
        self._batch.read(inputs)
        self._runner.prepare(order.plan)
        start = time.perf_counter()
        running = self._runner.launch(inputs)
        self._batch.begin(inputs)
        self._report()
        following = self._apply_meanwhile(running)
        sampled = running.wait()
        end = time.perf_counter()
        self._batch.commit(inputs, sampled)
        self._unreported = _Ran(order, inputs.scheduled, sampled, end - start, start - self._last_end, is_back_to_back)
        self._last_end = end
        if following is None:
            return self._apply_within(0.0)
        if not sampled.all_finite:
            return _Applied(following.order, self._batch.build(following.order.plan))
        return following

    def _apply_meanwhile(self, running: RunningStep) -> _Applied | None:
        """Wait for the next plan or the end of the step, and apply the plan if it comes first."""
        while (patience_s := running.patience_s()) > 0:
            applied = self._apply_within(patience_s)
            if applied is not None:
                self._runner.look_ahead(applied.inputs)
                return applied
        return None

    def _apply_within(self, seconds: float) -> _Applied | None:
        """The next plan, applied; None where none comes in time, or it is broken."""
        order = self._source.take_within(seconds)
        return None if order is None else self._apply(order)

    def _apply(self, order: Order) -> _Applied | None:
        """None where the plan is broken, and was given back."""
        if order.registration != self._registration:
            # After each registration the owner sends its sequences in full: what it does not send has ended.
            self._batch.clear()
            self._registration = order.registration
        try:
            return _Applied(order, self._batch.apply(order.plan))
        except ProtocolError as error:
            self._batch.clear()
            self._report()
            self._source.reject(order, error)
            return None

    def _report(self) -> None:
        ran, self._unreported = self._unreported, None
        if ran is not None:
            self._source.finish(ran.order, _output(ran))


def _output(ran: _Ran) -> StepOutput:
    plan, progress = ran.order.plan, Progress.of(ran.scheduled, ran.sampled)
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
        back_to_back=ran.back_to_back,
        candidates=progress.candidates,
    )
