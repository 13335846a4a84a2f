"""Which plans wait, which one runs, and which results are not committed yet. Pure state: no I/O, no threads, no clock.

The link calls it under its lock. Its rules are those of the contract: plans run in order; a plan of a lower epoch than
the highest seen is never run; a result is kept until it is committed, and sent again after each registration; a plan
that waits when its stream breaks is given back, not run.
"""

import logging
from collections import deque
from dataclasses import dataclass

from worker.errors import ProtocolError
from worker.wire import Plan, StepOutput

log = logging.getLogger("pagoda.worker")


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A plan to run, with the incarnation and the registration under which it came."""

    plan: Plan
    incarnation: str
    registration: int


class Ledger:
    """Of one incarnation after the other: `fence` begins the next."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.highest_epoch = 0
        self.highest_step_id = 0
        self.finished_step_id = 0
        self.committed_step_id = 0
        self._begun: deque[Order] = deque()
        self._registration = 0
        self._waiting: deque[Order] = deque()
        self._given_back: list[int] = []
        self._results: deque[StepOutput] = deque()

    @property
    def running(self) -> Order | None:
        """The first plan that was taken and not finished."""
        return self._begun[0] if self._begun else None

    @property
    def num_waiting(self) -> int:
        """Plans that `take` would return."""
        return len(self._waiting)

    @property
    def num_uncommitted(self) -> int:
        """Results that are kept."""
        return len(self._results)

    def registered(self, epoch: int, committed_step_id: int) -> list[int]:
        """Adopt an owner; the step ids of the plans that will not be run.

        Raises ProtocolError where a higher epoch has been seen: that owner has been succeeded.
        """
        if epoch < self.highest_epoch:
            raise ProtocolError(f"registered with epoch {epoch}, but epoch {self.highest_epoch} has been seen")
        self.highest_epoch = epoch
        self._registration += 1
        dropped = self._given_back + [order.plan.step_id for order in self._waiting if order.plan.epoch < epoch]
        self._given_back = []
        self._waiting = deque(order for order in self._waiting if order.plan.epoch >= epoch)
        self._forget(committed_step_id)
        return dropped

    def uncommitted(self) -> list[StepOutput]:
        """Results to send again, in order."""
        return list(self._results)

    def receive(self, plan: Plan) -> bool:
        """Queue a plan; False where its epoch is over. Raises ProtocolError where its step has been seen."""
        if plan.epoch < self.highest_epoch:
            log.warning("ignored plan %d of epoch %d: epoch is %d", plan.step_id, plan.epoch, self.highest_epoch)
            return False
        last = self._waiting[-1].plan.step_id if self._waiting else self.highest_step_id
        if plan.step_id <= last:
            raise ProtocolError(f"plan {plan.step_id} came after plan {last}")
        self.highest_epoch = plan.epoch
        self._forget(plan.committed_step_id)
        self._waiting.append(Order(plan, self.incarnation, self._registration))
        return True

    def take(self) -> Order | None:
        """The next plan, which now runs or will as soon as the one before it has; None where none waits."""
        if not self._waiting:
            return None
        order = self._waiting.popleft()
        self._begun.append(order)
        self.highest_step_id = order.plan.step_id
        return order

    def finish(self, order: Order, output: StepOutput) -> bool:
        """Keep the result of a plan that ran; False where its incarnation is over, and the result void."""
        self._begun.remove(order)
        if order.incarnation != self.incarnation:
            return False
        self.finished_step_id = output.step_id
        self._results.append(output)
        return True

    def reject(self, order: Order) -> None:
        """Give a plan that was taken back as one that was never started."""
        self._begun.remove(order)
        if order.incarnation == self.incarnation:
            self._given_back.append(order.plan.step_id)

    def stream_lost(self) -> None:
        """Hold back the plans that wait: the next owner numbers on from the one that runs."""
        self._given_back.extend(order.plan.step_id for order in self._waiting)
        self._waiting.clear()

    def fence(self, incarnation: str) -> None:
        """Begin anew under another incarnation; the highest epoch stays."""
        self.incarnation = incarnation
        self.highest_step_id = self.finished_step_id = self.committed_step_id = 0
        self._waiting.clear()
        self._results.clear()
        self._given_back = []

    def _forget(self, committed_step_id: int) -> None:
        self.committed_step_id = max(self.committed_step_id, committed_step_id)
        while self._results and self._results[0].step_id <= committed_step_id:
            self._results.popleft()
