"""The ledger under random operations: plans run once or are given back once, results are kept till committed."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.ledger import Ledger, Order
from worker.wire import Plan, StepOutput

_NONE = np.zeros(0, np.int64)
_NONE32 = np.zeros(0, np.int32)


def plan(epoch: int, step_id: int, committed_step_id: int) -> Plan:
    return Plan(epoch, step_id, committed_step_id, [], [], [], _NONE, _NONE32, [], [], _NONE, [], [], [], *[_NONE] * 4)


def output(order: Order) -> StepOutput:
    return StepOutput(
        order.plan.epoch, order.plan.step_id, [], _NONE, _NONE, _NONE, _NONE, _NONE, [], 0.0, 0.0, False, ()
    )


class OwnersAndPlans(RuleBasedStateMachine):
    """Owners that come and go, a stream that breaks, a worker that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("incarnation-0")
        self.epoch = 0
        self.is_registered = False
        self.next_step_id = 1
        self.committed = 0
        self.begun: list[Order] = []
        self.num_incarnations = 1
        # Of this incarnation: steps that were sent and accepted, and what became of them.
        self.accepted: list[int] = []
        self.run: list[int] = []
        self.dropped: list[int] = []
        self.finished: list[int] = []

    @rule(grows=st.integers(0, 2), behind=st.integers(0, 3))
    def register(self, grows: int, behind: int) -> None:
        """The owner has committed some of what was finished, and numbers on from the highest step it hears of.

        One that registers the worker again on the same stream has seized it anew, and its epoch has grown.
        """
        self.epoch += max(grows, self.epoch == 0 or self.is_registered)
        if not self.is_registered:
            self.next_step_id = max(self.ledger.highest_step_id, self.committed) + 1
        self.committed = max(self.committed, max(self.finished, default=0) - behind)
        self.dropped += self.ledger.registered(self.epoch, self.committed)
        self.is_registered = True
        # After a registration nothing waits that the owner does not know of.
        assert self.ledger.num_waiting == 0
        assert sorted(self.run + self.dropped) == sorted(self.accepted)

    @precondition(lambda self: self.is_registered)
    @rule(commit=st.booleans())
    def send(self, commit: bool) -> None:
        if commit:
            self.committed = max(self.committed, max(self.finished, default=0))
        assert self.ledger.receive(plan(self.epoch, self.next_step_id, self.committed))
        self.accepted.append(self.next_step_id)
        self.next_step_id += 1

    @precondition(lambda self: self.epoch > 1)
    @rule()
    def send_of_an_old_owner(self) -> None:
        waiting = self.ledger.num_waiting
        assert not self.ledger.receive(plan(self.epoch - 1, self.next_step_id + 5, 10**9))
        assert self.ledger.num_waiting == waiting

    @precondition(lambda self: len(self.begun) < 2)
    @rule()
    def take(self) -> None:
        waiting = self.ledger.num_waiting
        order = self.ledger.take()
        assert (order is not None) == (waiting > 0)
        if order is not None:
            assert not self.run or order.plan.step_id > max([*self.run, self.committed])
            self.run.append(order.plan.step_id)
            self.begun.append(order)
        assert self.ledger.running is (self.begun[0] if self.begun else None)

    @precondition(lambda self: self.begun)
    @rule()
    def finish(self) -> None:
        order = self.begun.pop(0)
        is_kept = self.ledger.finish(order, output(order))
        assert is_kept == (order.incarnation == self.ledger.incarnation)
        if is_kept:
            self.finished.append(order.plan.step_id)

    @precondition(lambda self: self.begun)
    @rule()
    def reject(self) -> None:
        order = self.begun.pop()
        self.ledger.reject(order)
        if order.incarnation == self.ledger.incarnation:
            self.run.remove(order.plan.step_id)
        self.lose_stream()

    @rule()
    def lose_stream(self) -> None:
        self.ledger.stream_lost()
        self.is_registered = False
        assert self.ledger.num_waiting == 0

    @rule()
    def fence(self) -> None:
        self.lose_stream()
        self.ledger.fence(f"incarnation-{self.num_incarnations}")
        self.num_incarnations += 1
        self.committed = 0
        self.accepted, self.run, self.dropped, self.finished = [], [], [], []

    @invariant()
    def results_are_kept_until_committed(self) -> None:
        kept = [result.step_id for result in self.ledger.uncommitted()]
        assert kept == sorted(kept)
        assert set(kept) >= {step for step in self.finished if step > self.committed}
        assert set(kept) <= set(self.finished)

    @invariant()
    def what_is_forgotten_is_said_to_be_committed(self) -> None:
        """By which a new owner tells a Redis that has lost some of it."""
        kept = {result.step_id for result in self.ledger.uncommitted()}
        assert all(step in kept or step <= self.ledger.committed_step_id for step in self.finished)
        assert self.ledger.committed_step_id <= self.committed

    @invariant()
    def the_highest_covers_what_was_run(self) -> None:
        own = any(order.incarnation == self.ledger.incarnation for order in self.begun)
        assert not own or self.ledger.highest_step_id >= self.run[-1]
        assert self.ledger.highest_epoch == self.epoch


TestOwnersAndPlans = OwnersAndPlans.TestCase
TestOwnersAndPlans.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
