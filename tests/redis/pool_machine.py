"""The state machine: a scheduler's mirror of a worker's blocks against a real Redis, through a faulty network.

The model knows what every sequence will say, what every slot of the physical pool holds, and what Redis must hold
after each numbered script. Rules do what schedulers, a worker and a bad network can do; what must always hold is
checked after each of them.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.keys import worker_key
from scheduler.pins import PIN_BIT
from scheduler.redis_pipe import RedisPipe
from scheduler.scripts import ALL_SCRIPTS
from scheduler.store import WorkerImage, WorkerStore
from scheduler.swapper import Swap
from tests.redis.faulty_wire import FaultyWire, Message
from tests.redis.model_owner import Owner
from tests.redis.model_state import Expected, Tracked, World
from tests.redis.redis_dump import dump
from tests.redis.watcher import Watcher
from tests.redis.worker_model import BLOCK_SIZE, Plan, Story, Worker
from tests.redis.wrong_changes import wrong_changes
from tests.redis_servers import RedisServer

T = TypeVar("T")
WORKER = "worker-0"
LOG_TTL_S = 600
MAX_PLANS = 3
MAX_SEQUENCES = 8
MAX_BLOCKS = 6
"""Of one sequence."""
PREFIXES = ((0,), (0, 0), (0, 1), (0, 1, 0), (0, 1, 0), (1, 0), (), (0, 1, 1))
NOBODY = 99_999
events: Counter[str] = Counter()
"""What happened, over all machines of this process: a case that no machine met is not tested."""


class PoolMachine(RuleBasedStateMachine):
    """Subclasses name the server."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.server.flush()
        self.client = self.server.client()
        self.loop = asyncio.new_event_loop()
        self.pipe = RedisPipe(self.server.url, ALL_SCRIPTS)
        self._run(self._start())
        self.world = World(events=events)
        self.world.expected[0] = Expected(WorkerImage(PoolImage(0, {}, {}, {}), {}, {}, {}, {}), 0, {})
        self.stale: list[Message] = []
        self.owner = self._new_owner()
        self._run(self.owner.store.seize(0))
        self.num_incarnations = self.num_sequences = self.num_operations = 0
        self.results: deque[Plan] = deque()
        self.swapped: deque[tuple[int, Swap]] = deque()
        self.watcher = Watcher(self.world, self.client, WORKER, self._run)
        self._new_worker(7, 7)

    async def _start(self) -> None:
        self.pipe.start()

    def _run(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return self.loop.run_until_complete(run())

    def _new_owner(self) -> Owner:
        wire = FaultyWire(self.pipe, self.loop)
        return Owner(self.world, WorkerStore(wire, WORKER, LOG_TTL_S), wire)

    def teardown(self) -> None:
        """Leaves nothing behind."""
        self._run(self.pipe.close())
        self.loop.close()
        self.client.close()

    # -- what may happen ----------------------------------------------------------------------------------------------

    def _enabled(self) -> list[str]:
        """The operations that would do something now, each as often as it is to come."""
        owner, wire, all_ = self.owner, self.owner.wire, self.owner.sequences.values()
        num_running = sum(s.is_running for s in all_)
        num_available = owner.blocks.num_available_blocks
        self.worker.begin_swaps()
        can_plan = not owner.resent and len(owner.in_flight) < MAX_PLANS
        has_room = len(all_) < MAX_SEQUENCES
        is_arriving = any(s.is_running and s.num_arriving_blocks and s.num_acked_blocks for s in all_)
        weights = {
            "arrive": 3 * (has_room and num_running < 4),
            "admit": (8 if num_available > 3 else 1) * any(_is_waiting(s) for s in all_),
            "grow": 3 * (num_available > 0 and any(_needs_a_block(s) for s in all_)),
            "fork": 4 * (has_room and any(self._is_forkable(s) for s in all_)),
            "preempt": 1 * (num_running > 0) + 4 * is_arriving,
            "branch": 2 * (num_available > 0 and len(self._branches()) > 0),
            "pin": 1 * any(self._is_pinnable(s) for s in all_),
            "expire": 1 * bool(owner.pins.pinned),
            "send_out": 8 * bool(self._sendable()),
            "swap": (3 if is_arriving else 10) * bool(self.worker.swaps),
            "apply_swap": 10 * bool(self.swapped),
            "finish": 2 * any(not s.is_finished for s in all_) + 4 * any(_is_full(s) for s in all_),
            "drop_row": 2 * any(s.is_finished for s in all_),
            "move": 1 * any(_is_waiting(s) for s in all_),
            "plan": 10 * (can_plan and (owner.has_acked_swaps or any(s.num_plannable > 0 for s in all_))),
            "run_plan": 8 * bool(self.worker.plans),
            "apply_result": 8 * bool(self.results),
            "commit": 6 * (bool(owner.blocks.changes) or owner.applied_step_id != self._committed_step_id),
            "answer": 8 * bool(wire.unanswered),
            "lose_a_reply": 2 * (wire.num_unapplied > 0),
            "repeat_a_script": 1 * (len(wire.answered) > 0),
            "overtake": 1 * (wire.num_unapplied > 1),
            "deliver_a_stale_script": 1 * bool(self.stale),
            "send_wrong_content": 1,
            "seize": 1 * (self.num_operations % 3 == 0) + 12 * is_arriving,
            "lose_the_worker": 1 * (self.num_operations > 200 * self.num_incarnations),
        }
        return [name for name, weight in weights.items() for _ in range(weight)]

    @rule(seed=st.integers(0, 2**20))
    def step(self, seed: int) -> None:
        """One operation: hypothesis favours small numbers, so its draw is only a seed of the choice."""
        draw = Random(seed << 16 | self.num_operations)
        operation = draw.choice(self._enabled())
        pick, amount = draw.randrange(100), draw.randrange(10)
        note(f"  {operation}({pick}, {amount})")
        self.num_operations += 1
        getattr(self, operation)(pick, amount)

    @property
    def _committed_step_id(self) -> int:
        return self.world.expected[self.owner.store.n].committed_step_id

    def _pick(self, pick: int, condition: Callable[[Tracked], bool]) -> Tracked:
        found = [s for s in self.owner.sequences.values() if condition(s)]
        return found[pick % len(found)]

    def _next_seq_id(self) -> int:
        self.num_sequences += 1
        return self.num_sequences

    def arrive(self, pick: int, amount: int) -> None:
        """A new sequence; many share prefixes, some have another salt."""
        prompt = [token for token in PREFIXES[pick % len(PREFIXES)] for _ in range(BLOCK_SIZE)]
        prompt += [2] * (amount % BLOCK_SIZE)
        salt = "salt" if pick % 5 == 0 else ""
        self.owner.open(Story(self._next_seq_id(), salt, tuple(prompt)))
        events["arrivals"] += 1

    def admit(self, pick: int, amount: int) -> None:
        """One that waits: hits are shared, and each holds exactly what the sequence would have written."""
        sequence = self._pick(pick, _is_waiting)
        found = self.owner.admit(sequence, 1 + amount // 2)
        for place, block_id in enumerate(found.block_ids if found else ()):
            content = (sequence.story.salt, sequence.story.tokens((place + 1) * BLOCK_SIZE))
            if block_id:
                assert self.worker.holds(block_id, *content), "served a block that nobody wrote"
            else:
                assert self.worker.holds_on_host(found.host_block_ids[place], *content), "served a host block, as badly"
        events["does not fit" if found is None else "readmissions" if sequence.attempt else "admissions"] += 1

    def grow(self, pick: int, amount: int) -> None:
        """Blocks for what a sequence will generate."""
        num_new = 1 + amount % min(2, self.owner.blocks.num_available_blocks)
        self.owner.grow(self._pick(pick, _needs_a_block), num_new)
        events["growths"] += 1

    def _is_forkable(self, sequence: Tracked) -> bool:
        """Whether Redis has its table, some of it is computed, and its blocks are its own and no copies to be."""
        is_there = sequence.is_running and not sequence.num_arriving_blocks
        is_settled = is_there and sequence.num_acked_blocks == len(sequence.table)
        pending = self.owner.blocks.pending_copies
        return is_settled and sequence.num_computed > 0 and pending.keys().isdisjoint(sequence.table)

    def fork(self, pick: int, amount: int) -> None:
        """A second sequence goes on from where a first one is."""
        events["forks"] += self.owner.fork(self._pick(pick, self._is_forkable), self._next_seq_id())

    def _branches(self) -> list[tuple[Tracked, Tracked]]:
        """Who may go on from whom: of whom no plan in flight may still sample a token."""
        all_, changes = self.owner.sequences.values(), self.owner.blocks.changes
        children = [
            s for s in all_ if s.is_running and not s.num_in_flight and not s.num_outputs and s.num_acked_blocks
        ]
        if changes.reserve or changes.fork:
            return []  # both are told of with the releases of one step, in one script
        parents = [s for s in all_ if self._is_forkable(s) and s.num_computed == s.num_tokens - 1]
        return [(p, c) for p in parents for c in children if c is not p]

    def branch(self, pick: int, amount: int) -> None:
        """A beam drops its blocks for a share of another's."""
        branches = self._branches()
        self.owner.branch(*branches[pick % len(branches)])
        events["branches"] += 1

    def _is_pinnable(self, sequence: Tracked) -> bool:
        is_there = sequence.is_running and not sequence.num_arriving_blocks
        is_pinned = sequence.seq_id | PIN_BIT in self.owner.pins.pinned
        return is_there and not is_pinned and sequence.num_published > 0 and self.owner.pins.num_blocks_left > 0

    def pin(self, pick: int, amount: int) -> None:
        """A prefix is to stay, whatever becomes of its sequence."""
        if self.owner.blocks.changes.release:
            self.owner.commit()  # an earlier pin of the same name may be among them
        self.owner.pin(self._pick(pick, self._is_pinnable), self.num_operations)
        events["pins"] += 1

    def expire(self, pick: int, amount: int) -> None:
        """The time of some pins is over, or one has to give way."""
        if self.owner.blocks.changes.reserve or self.owner.blocks.changes.fork:
            self.owner.commit()  # releases are applied before them
        before = len(self.owner.pins.pinned)
        self.owner.pins.expire(self.num_operations) if amount else self.owner.pins.give_way()
        events["pins that ended"] += before - len(self.owner.pins.pinned)

    def preempt(self, pick: int, amount: int) -> None:
        """Whatever plans name it."""
        sequence = self._pick(pick, _is_running)
        self.owner.preempt(sequence)
        events["preemptions with a plan in flight" if sequence.num_in_flight else "preemptions"] += 1

    def _sendable(self) -> list[int]:
        swapper = self.owner.swapper
        if swapper.num_outs_left <= 0:
            return []
        blocks = self.owner.blocks
        cached = [i for i in blocks.coldest_first() if swapper.can_go_out(i)]
        return cached or [i for i in blocks.image().hashes if swapper.can_go_out(i)]

    def send_out(self, pick: int, amount: int) -> None:
        """A block that is published goes out, be it in use or not."""
        block_ids = self._sendable()
        self.owner.send_out(block_ids[pick % len(block_ids)])
        events["swaps out"] += 1

    def swap(self, pick: int, amount: int) -> None:
        """The worker does what is under way, whatever it runs meanwhile."""
        for _ in range(min(1 + amount // 3, len(self.worker.swaps))):
            self.swapped.append(self.worker.swap())

    def apply_swap(self, pick: int, amount: int) -> None:
        """The owner hears of it, or, if it was another's, does not care."""
        epoch, swap = self.swapped.popleft()
        if epoch == self.owner.store.epoch:
            self.owner.finish_swap(swap)
            events["swaps in"] += not swap.is_out
        else:
            events["swaps of an earlier owner"] += 1

    def finish(self, pick: int, amount: int) -> None:
        """One has ended, or its client is gone."""
        full = any(_is_full(s) for s in self.owner.sequences.values())
        self.owner.finish(self._pick(pick, _is_full if full else lambda s: not s.is_finished))
        events["ends"] += 1

    def drop_row(self, pick: int, amount: int) -> None:
        """An ended sequence's row goes."""
        self.owner.drop_row(self._pick(pick, lambda s: s.is_finished), expires=True)
        events["closes"] += 1

    def move(self, pick: int, amount: int) -> None:
        """A sequence that waits goes on under another worker's tag."""
        if amount == 0:
            self.owner.drop_row(self._pick(pick, _is_waiting), expires=False)
            events["moves"] += 1

    # -- steps --------------------------------------------------------------------------------------------------------

    def plan(self, pick: int, amount: int) -> None:
        """A step, ahead of the results of those before it, perhaps without some of the sequences."""
        plan = self.owner.plan(1 + amount, pick if pick < 8 else 0)
        if plan is not None:
            self.worker.plans.append(plan)
            events["plans"] += 1

    def run_plan(self, pick: int, amount: int) -> None:
        """The worker runs its oldest plan, which reads only what is written and writes only where it may."""
        self.results.append(self.worker.run(self.owner.is_published))

    def apply_result(self, pick: int, amount: int) -> None:
        """The owner counts the oldest result that it has not counted."""
        events["results from an earlier owner's time" if self.owner.resent else "results"] += 1
        self.owner.apply(self.results.popleft())

    # -- scripts ------------------------------------------------------------------------------------------------------

    def commit(self, pick: int, amount: int) -> None:
        """One script with all that was decided since the last."""
        self.owner.commit()

    def lose_a_reply(self, pick: int, amount: int) -> None:
        """A script is applied, and nobody hears of it."""
        self._run(self.owner.wire.apply_next())
        events["lost replies"] += 1

    def answer(self, pick: int, amount: int) -> None:
        """The oldest scripts are sent, again where their replies were lost, in order, and answered."""
        for _ in range(min(1 + amount, len(self.owner.wire.unanswered))):
            events["resent after a lost reply"] += self.owner.wire.unanswered[0].is_applied
            self.owner.acknowledge(self._run(self.owner.wire.answer_oldest()))

    def _refused(self, message: Message, verdict: str, what: str = "") -> None:
        before = dump(self.client)
        answer = self._run(self.owner.wire.deliver(message))
        text = answer.decode() if isinstance(answer, bytes) else str(answer)
        assert text.startswith(verdict), f"{answer!r} is not {verdict}: {what}"
        assert dump(self.client) == before, f"Redis said {verdict} and changed"
        events[f"answers {verdict}"] += 1

    def repeat_a_script(self, pick: int, amount: int) -> None:
        """The network delivers once more what Redis has applied: counted once."""
        wire = self.owner.wire
        applied = [*wire.answered[-9:], *(m for m in wire.unanswered if m.is_applied)]
        self._refused(applied[-1 - pick % len(applied)], "done")

    def overtake(self, pick: int, amount: int) -> None:
        """A script reaches Redis before the one that it stands on."""
        early = [m for m in self.owner.wire.unanswered if not m.is_applied][1:]
        self._refused(early[pick % len(early)], "GAP")

    def deliver_a_stale_script(self, pick: int, amount: int) -> None:
        """What an earlier owner sent arrives late, or once more."""
        self._refused(self.stale[-1 - pick % len(self.stale)], "STALE")

    def send_wrong_content(self, pick: int, amount: int) -> None:
        """The right number with content that does not fit what Redis holds, between rows that would."""
        meta = self._meta()
        image = self._run(self.owner.store.load())
        wrongs = wrong_changes(image)
        name, wrong = wrongs[pick % len(wrongs)]
        wrong.append.insert(0, (NOBODY, 0, [1]))  # would fit, and so would the row behind
        wrong.describe.append((NOBODY, b"never written"))
        wire = FaultyWire(self.pipe, self.loop)
        store = WorkerStore(wire, WORKER, LOG_TTL_S)
        store.epoch, store.n = int(meta[b"epoch"]), int(meta.get(b"n", 0))
        store.commit(wrong, 0)
        self._refused(wire.unanswered[0], "REFUSED", name)
        events[f"refused: {name}"] += 1

    # -- owners and incarnations --------------------------------------------------------------------------------------

    def _meta(self) -> dict[bytes, bytes]:
        meta: dict[bytes, bytes] = self.client.hgetall(worker_key(WORKER, "meta"))
        return meta

    def seize(self, pick: int, amount: int) -> None:
        """Another owner raises the epoch, fences the first, and rebuilds everything from Redis."""
        events["seizures with scripts in flight" if self.owner.wire.num_unapplied else "seizures"] += 1
        old, new = self.owner, self._new_owner()
        seen_by_worker = max(0, old.store.epoch + amount - 5)
        for _ in range(1 + pick % 2):  # the reply was lost, and the pipe asked again
            before = int(self._meta()[b"epoch"])
            meta = self._run(new.store.seize(seen_by_worker))
            assert meta.epoch == max(before, seen_by_worker) + 1
        old.store.commit(Changes(describe=[(NOBODY, b"too late")]), 0)
        self.stale += [*old.wire.answered[-3:], *old.wire.unanswered]
        expected = self.world.expected[meta.n]
        assert meta.committed_step_id == expected.committed_step_id
        if pick % 3 and self.worker.plans:
            self.worker.run(old.is_published)  # it was running already
        self.worker.plans.clear()
        image = self._run(new.store.load())
        new.adopt(image, expected, self.worker.highest_step_id)
        self.results = deque(plan for plan in self.worker.done if plan.step_id > meta.committed_step_id)
        if meta.incarnation != self.worker.incarnation:
            self.results.clear()  # its death is decided, not yet in Redis: the new owner finds out
            new.reclaim(self.worker.incarnation, self.worker.num_blocks, self.worker.num_host_blocks)
        new.resent = {plan.step_id for plan in self.results}
        self.owner = new

    def lose_the_worker(self, pick: int, amount: int) -> None:
        """Its incarnation is dead: nothing of it stays reachable; a new one begins with an empty pool."""
        events["dead incarnations"] += 1
        self._new_worker(6 + amount % 5, (0, 3, 6, 9)[pick % 4])

    def _new_worker(self, num_blocks: int, num_host_blocks: int) -> None:
        self.num_incarnations += 1
        self.worker = Worker(f"i{self.num_incarnations}", num_blocks, num_host_blocks)
        self.results.clear()
        self.swapped.clear()
        self.owner.reclaim(self.worker.incarnation, num_blocks, num_host_blocks)

    @invariant()
    def what_must_always_hold(self) -> None:
        """After every operation."""
        self.watcher.check(self.owner, self.worker)
        events["operations"] += 1


def _is_waiting(sequence: Tracked) -> bool:
    """Whether it may be admitted: no plan in flight names an earlier attempt of it."""
    return not sequence.is_running and not sequence.is_finished and not sequence.num_in_flight


def _is_running(sequence: Tracked) -> bool:
    return sequence.is_running


def _needs_a_block(sequence: Tracked) -> bool:
    return sequence.is_running and len(sequence.table) < MAX_BLOCKS


def _is_full(sequence: Tracked) -> bool:
    """Whether it can say no more: the end that comes to all."""
    return sequence.is_running and sequence.num_tokens > MAX_BLOCKS * BLOCK_SIZE
