"""The loop of one worker: results in, decisions on the mirror, one plan and one numbered script out.

Lives from a registration of the worker to its loss. Decide in Python, make it true in Redis, never wait: a plan names
only blocks whose reservation is acknowledged, a token is delivered only after the script that logs it, and neither
holds up the other.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import thread_time, time
from typing import Protocol

from pagoda.v1 import worker_pb2 as pb

from scheduler.committer import Committer
from scheduler.live_request import LiveChoice, LiveRequest
from scheduler.plan_length import PlanLength
from scheduler.planner import Planner
from scheduler.results import ProtocolError, Results, Step
from scheduler.sequence import SequenceStatus
from scheduler.step_clock import StepClock
from scheduler.tally import Tally
from scheduler.wire import StepNumbers, StepWork, build_plan, sampler_params

log = logging.getLogger("pagoda.engine")

MAX_LOOKAHEAD = 64
PLAN_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Link(Protocol):
    """The worker's end of the stream."""

    async def send(self, plan: pb.StepPlan) -> None:
        """Hands a plan to the stream; raises ConnectionError where it is broken."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    planner: Planner
    committer: Committer
    link: Link
    clock: StepClock
    plan_length: PlanLength
    redis_round_trip_s: Callable[[], float]


class Engine:
    """Runs one worker. `lost` resolves with the reason once the worker, or the ownership of it, is gone."""

    def __init__(self, parts: EngineParts, next_step_id: int) -> None:
        self.worker, self.epoch = parts.committer.owner
        self.planner = parts.planner
        self.committer = parts.committer
        self.clock = parts.clock
        self.live: dict[int, LiveChoice] = {}
        self.results = Results(parts.planner, parts.committer, self.live)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_steps = 0
        self.num_step_tokens = 0
        self.phase_s = {"apply": 0.0, "plan": 0.0, "commit": 0.0, "link": 0.0}
        self.plan_tokens, self.plan_sequences = Tally(PLAN_SIZES), Tally(PLAN_SIZES)
        self.poisons_freed_blocks = False
        self._link = parts.link
        self._plan_length = parts.plan_length
        self._redis_round_trip_s = parts.redis_round_trip_s
        self._samplers: dict[int, pb.SamplerParams] = {}
        self._arrived: deque[pb.StepResult] = deque()
        self._swapped: deque[pb.SwapsDone] = deque()
        self._endings: list[LiveChoice] = []
        self._in_flight: deque[Step] = deque()
        self._resent: set[int] = set()
        self._next_step_id = next_step_id
        self._applied_step_id = self.committer.committed_step_id = next_step_id - 1
        self._must_reserve = True
        self._steps_per_plan = 1
        self._is_settled = False
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    # -- called from outside ------------------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether nothing more will come of it."""
        return self.lost.done()

    def start(self) -> None:
        """Begins to plan."""
        self._loop = asyncio.get_running_loop().create_task(self._run())
        self._loop.add_done_callback(self._on_loop_done)
        self._wake.set()

    def wake(self) -> None:
        """Something has changed that may let it plan."""
        self._wake.set()

    def look_again(self) -> None:
        """Something outside has changed what is to be reserved: a pin has expired, or is to go."""
        self._must_reserve = True
        self._wake.set()

    def expect_results(self, committed_step_id: int) -> None:
        """The worker will first send what an earlier owner planned and did not commit; nothing is planned before."""
        self._resent = set(range(committed_step_id + 1, self._next_step_id))
        self._applied_step_id = self.committer.committed_step_id = committed_step_id

    def open(self, live: LiveRequest) -> "asyncio.Future[None]":
        """Takes a new or a moved request; it is durable under this worker's tag once the future is done."""
        self.hold(live)
        return self.committer.accept(live)

    def hold(self, live: LiveRequest) -> None:
        """Makes a request this engine's, without a word to Redis; its running choices have their blocks here."""
        leader = live.choices[0].sequence
        for choice in live.choices:
            sequence = choice.sequence
            self.live[sequence.seq_id] = choice
            self._samplers[sequence.seq_id] = sampler_params(sequence, live.body.sampling)
            if sequence.status is SequenceStatus.RUNNING:
                self.planner.adopt_running(sequence)
            else:
                follows = sequence is not leader and not sequence.num_output_tokens
                self.planner.enqueue(sequence, leader if follows else None)
            if choice.ending is not None:
                self._endings.append(choice)
        self._must_reserve = True
        self._wake.set()

    def end(self, live: LiveRequest) -> None:
        """Carries out the endings that its choices were given at the next step."""
        self._endings += [choice for choice in live.choices if choice.ending is not None]
        self._wake.set()

    def drop(self, live: LiveRequest) -> None:
        """Its end is recorded: nothing of it is needed here any more."""
        for choice in live.choices:
            del self.live[choice.sequence.seq_id], self._samplers[choice.sequence.seq_id]
        self._wake.set()

    def on_result(self, result: pb.StepResult) -> None:
        """Takes a result from the link."""
        self._arrived.append(result)
        # Of one that an earlier owner planned, its tokens tell.
        num_steps = max(1, *result.num_tokens) if result.num_tokens else 1
        self.clock.on_result(result.step_s / num_steps, result.gap_s, result.back_to_back)
        self._wake.set()

    def on_swaps_done(self, done: pb.SwapsDone) -> None:
        """Takes a report of swaps; one for an earlier owner says nothing of those that were issued again."""
        if done.epoch == self.epoch:
            self._swapped.append(done)
            self._wake.set()

    def on_dropped(self, step_ids: Iterable[int]) -> None:
        """Steps of an earlier owner that will have no result."""
        self._resent.difference_update(step_ids)
        self._wake.set()

    def lose(self, reason: str) -> None:
        """The worker is gone, or Redis says that it is another owner's."""
        if not self.lost.done():
            self.lost.set_result(reason)

    async def retire(self) -> None:
        """Stops planning and waits until everything decided so far is in Redis."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self.committer.flush(self._applied_step_id)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            t0 = thread_time()
            self._apply_results()
            self._apply_swaps()
            self._apply_endings()
            t1 = thread_time()
            plans = self._plan_ahead()
            t2 = thread_time()
            for plan in plans:
                await self._link.send(plan)
            t3 = thread_time()
            self._reserve()
            t4 = thread_time()
            self.committer.send(self._applied_step_id)
            self._count_phases(t0, t1, t2, t3, t4, thread_time())

    def _apply_results(self) -> None:
        while self._arrived:
            self._must_reserve = True
            result = self._arrived.popleft()
            if result.step_id in self._resent:
                self._resent.discard(result.step_id)
                self.results.apply_resent(result)
            elif self._in_flight and self._in_flight[0].step_id == result.step_id:
                step = self._in_flight.popleft()
                if step.num_steps > 1 or 0 < step.num_tokens == len(step.rows):
                    self._plan_length.on_decodes(step.num_tokens / step.num_steps, result.step_s / step.num_steps)
                self.results.apply(step, result)
                self.num_step_tokens += step.num_tokens
                self.num_steps += step.num_steps - 1
            elif result.step_id <= self._applied_step_id:
                continue  # a duplicate: counted once
            else:
                raise ProtocolError(f"result of step {result.step_id} out of order")
            self._applied_step_id = max(self._applied_step_id, result.step_id)
            self.num_steps += 1

    def _apply_swaps(self) -> None:
        while self._swapped:
            self._must_reserve = True
            done = self._swapped.popleft()
            try:
                self.planner.swapper.finish(done.host_block_ids, done.block_ids)
            except KeyError as error:
                raise ProtocolError(f"a swap into block {error} was never begun") from None
            self.planner.swap_ahead.learn_moves(len(done.host_block_ids) + len(done.block_ids), done.seconds)

    def _apply_endings(self) -> None:
        endings, self._endings = self._endings, []
        for choice in endings:
            if choice.sequence.seq_id in self.live and choice.sequence.status is not SequenceStatus.FINISHED:
                assert choice.ending is not None
                self._must_reserve = True
                self.results.finish(choice, choice.ending)

    def _plan_ahead(self) -> list[pb.StepPlan]:
        plans: list[pb.StepPlan] = []
        if self._resent or self.committer.is_full or self.is_lost:
            return plans
        if not self._is_settled:
            self._is_settled = True
            self.planner.settle()
        self._steps_per_plan = self._steps_of_next_plan()
        while len(self._in_flight) <= self.clock.num_plans_ahead:
            num_steps = self.planner.num_steps_alike(self._steps_per_plan)
            rows = self.planner.schedule(num_steps)
            copies, self.committer.acked_copies = self.committer.acked_copies, []
            swaps, self.committer.acked_swaps = self.committer.acked_swaps, []
            if not rows and not copies and not swaps:
                break
            numbers = StepNumbers(self.epoch, self._next_step_id, self.committer.committed_step_id)
            plan = build_plan(numbers, StepWork(rows, copies, self.planner.removed, swaps, num_steps), self._samplers)
            self.planner.removed.clear()
            if self.poisons_freed_blocks:
                plan.freed_block_ids.extend(self.planner.blocks.freed_block_ids)
            self.planner.blocks.freed_block_ids.clear()
            num_tokens = sum([row.num_tokens for row in rows])
            copied = [copy.destination for copy in copies]
            self._in_flight.append(Step(self._next_step_id, rows, num_tokens, copied, num_steps))
            self.clock.on_plan(num_tokens, num_steps)
            self.plan_tokens.observe(num_tokens / num_steps, num_steps)
            self.plan_sequences.observe(num_tokens / num_steps if num_steps > 1 else len(rows), num_steps)
            self._next_step_id += 1
            self._must_reserve = True
            plans.append(plan)
        return plans

    def _reserve(self) -> None:
        """Blocks for the plans to come, ahead by the time that Redis takes."""
        if not self._must_reserve:
            return
        self._must_reserve = False
        self.planner.history.now_s = time()
        self.planner.pins.expire(self.planner.history.now_s)
        self.planner.swap_ahead.learn(self.clock.step_s, self.clock.marginal_s_per_token)
        num_steps_away = self._redis_round_trip_s() / max(self.clock.step_s, 1e-4)
        lookahead = min(int(num_steps_away) + 1 + self.clock.num_plans_ahead, MAX_LOOKAHEAD)
        self.planner.grow_and_admit(lookahead, min(self._steps_per_plan, MAX_LOOKAHEAD // lookahead))
        for sequence in self.planner.reserved:
            self.committer.note_reserved(sequence)
        for sequence in self.planner.redescribed:
            self.committer.describe(sequence)
        for copy in self.planner.forks.copies:
            self.committer.note_copy(copy)
        for swap in self.planner.swapper.started:
            self.committer.note_swap(swap)
        self.planner.reserved.clear()
        self.planner.redescribed.clear()
        self.planner.forks.copies.clear()
        self.planner.swapper.started.clear()

    def _steps_of_next_plan(self) -> int:
        """Where it may have more than one."""
        running, live = self.planner.running, self.live
        patience = min([live[sequence.seq_id].request.patience for sequence in running], default=1)
        return self._plan_length.num_steps(len(running), patience)

    def _count_phases(self, *times: float) -> None:
        applied, planned, sent, reserved, committed = (b - a for a, b in itertools.pairwise(times))
        self.phase_s["apply"] += applied
        self.phase_s["plan"] += planned + reserved
        self.phase_s["link"] += sent
        self.phase_s["commit"] += committed

    def _on_loop_done(self, loop: "asyncio.Task[None]") -> None:
        error = None if loop.cancelled() else loop.exception()
        if isinstance(error, ConnectionError):
            self.lose(f"its stream broke: {error}")
        elif isinstance(error, ProtocolError):
            self.lose(f"it broke the contract: {error}")
        elif error is not None:
            log.error("the loop of %s failed", self.worker, exc_info=error)
            self.lose(f"our bug: {error!r}")
