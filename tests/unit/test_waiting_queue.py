"""Who is next, against a queue that is written down as plainly as the rule."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.sequence import Sequence, SequenceLimits
from scheduler.waiting_queue import WaitingQueue


def sequence(seq_id: int, tenant: str = "", priority: int = 0, num_tokens: int = 1) -> Sequence:
    limits = SequenceLimits(8, frozenset(), ignores_eos=False)
    return Sequence(seq_id, f"r{seq_id}", 0, [1] * num_tokens, num_tokens, limits, b"", priority, tenant)


def order(queue: WaitingQueue) -> list[int]:
    return [waiting.seq_id for waiting in queue]


class QueueMachine(RuleBasedStateMachine):
    """Pushes, removals and charges, against a list that is sorted by the rule each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.waiting: list[Sequence] = []
        self.served: dict[str, int] = {}
        self.last_to_leave = ""
        self.num_sequences = 0

    @rule(tenant=st.sampled_from("abc"), priority=st.sampled_from([0, 0, 1, -1]), num_tokens=st.integers(1, 9))
    def push(self, tenant: str, priority: int, num_tokens: int) -> None:
        self.num_sequences += 1
        self._push(sequence(self.num_sequences, tenant, priority, num_tokens))

    def _push(self, pushed: Sequence) -> None:
        active = [self.served[s.tenant] for s in self.waiting]
        if pushed.tenant not in {s.tenant for s in self.waiting}:
            level = min(active) if active else self.served.get(self.last_to_leave, 0)
            self.served[pushed.tenant] = max(self.served.get(pushed.tenant, 0), level)
        self.queue.push(pushed)
        self.waiting.append(pushed)

    @rule(index=st.integers(0, 20), comes_back=st.booleans(), num_more=st.integers(0, 5))
    def remove(self, index: int, comes_back: bool, num_more: int) -> None:
        if self.waiting:
            gone = self.waiting.pop(index % len(self.waiting))
            self.queue.remove(gone)
            if gone.tenant not in {s.tenant for s in self.waiting}:
                self.last_to_leave = gone.tenant
            if comes_back:  # preempted: by its arrival again, longer by what it generated
                gone.token_ids += [1] * num_more
                self._push(gone)

    @rule(tenant=st.sampled_from("abcd"), num_tokens=st.integers(0, 30))
    def charge(self, tenant: str, num_tokens: int) -> None:
        self.queue.charge(tenant, num_tokens)
        if tenant in self.served:
            self.served[tenant] += num_tokens

    @invariant()
    def is_in_order(self) -> None:
        assert order(self.queue) == self._expected()
        assert len(self.queue) == len(self.waiting)
        assert bool(self.queue) == bool(self.waiting)

    def _expected(self) -> list[int]:
        """Always the least served tenant's first arrival, its tokens counted as served; by priority first."""
        found: list[int] = []
        for priority in sorted({s.priority for s in self.waiting}):
            left = sorted((s for s in self.waiting if s.priority == priority), key=lambda s: s.seq_id)
            served = dict(self.served)
            while left:
                heads = {s.tenant: s for s in reversed(left)}
                _, _, head = min((served[tenant], s.seq_id, s) for tenant, s in heads.items())
                served[head.tenant] += len(head.token_ids)
                left.remove(head)
                found.append(head.seq_id)
        return found


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(deadline=None, max_examples=60)


def test_a_tenant_that_was_idle_is_level_with_the_least_served_of_those_that_wait() -> None:
    queue = WaitingQueue()
    for seq_id in (1, 2, 3):
        queue.push(sequence(seq_id, "busy"))
    queue.charge("busy", 1000)
    for seq_id in (4, 5, 6):
        queue.push(sequence(seq_id, "new"))
    assert order(queue) == [1, 4, 2, 5, 3, 6], "turns from now on, no debt of the past"


def test_idleness_saves_no_credit_even_while_nobody_waits() -> None:
    """A tenant alone is served at once; one that comes then must not own the queue for as long as that took."""
    queue = WaitingQueue()
    for seq_id in range(1, 100):
        alone = sequence(seq_id, "early", num_tokens=100)
        queue.push(alone)
        queue.remove(alone)
        queue.charge("early", 100)
    for seq_id in (101, 103, 105):
        queue.push(sequence(seq_id, "late", num_tokens=10))
    for seq_id in (102, 104, 106):
        queue.push(sequence(seq_id, "early", num_tokens=10))
    assert order(queue) == [101, 102, 103, 104, 105, 106]


def test_a_preempted_sequence_stands_where_its_arrival_puts_it() -> None:
    queue = WaitingQueue()
    sequences = [sequence(seq_id) for seq_id in range(1, 6)]
    for waiting in sequences:
        queue.push(waiting)
    queue.remove(sequences[1])
    queue.push(sequences[1])
    assert order(queue) == [1, 2, 3, 4, 5]


def test_a_priority_is_served_to_its_end_before_the_next() -> None:
    queue = WaitingQueue()
    for seq_id, priority in ((1, 1), (2, 0), (3, 1), (4, -1), (5, 0)):
        queue.push(sequence(seq_id, f"t{seq_id}", priority))
    assert order(queue) == [4, 2, 5, 1, 3]


def test_one_may_be_removed_while_the_queue_is_read() -> None:
    """As the planner does when it admits."""
    queue = WaitingQueue()
    for seq_id in range(1, 9):
        queue.push(sequence(seq_id, "ab"[seq_id % 2], seq_id % 3))
    for waiting in queue:
        queue.remove(waiting)
        queue.charge(waiting.tenant, len(waiting.token_ids))
    assert not queue


def test_tenants_that_never_come_back_are_forgotten() -> None:
    queue = WaitingQueue()
    for seq_id in range(1, 20_000):
        once = sequence(seq_id, f"tenant-{seq_id}")
        queue.push(once)
        queue.remove(once)
        queue.charge(once.tenant, 1)
    assert len(queue._served_tokens) < 2000
