"""The loop of one worker: results in, decisions on the mirror, one numbered script and one plan out.

Owns everything between one registration of a worker and the loss of it. Decide in Python, make it true in Redis, never
wait: a plan names only blocks whose reservation is acknowledged, a token is delivered only after the script that logs
it, and neither holds up the other.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from pagoda.v1 import worker_pb2 as pb

from scheduler.changes import Changes
from scheduler.live_request import Ending, EndState, LiveRequest
from scheduler.planner import Planner, ScheduledRow
from scheduler.sequence import FinishReason, Sequence, SequenceStatus
from scheduler.step_clock import StepClock
from scheduler.store import OwnershipLostError, RequestStore, SequenceRow, WorkerStore
from scheduler.wire import StepNumbers, build_plan, result_rows, sampler_params

log = logging.getLogger("pagoda.engine")

MAX_PLANS_IN_FLIGHT = 2
"""One that runs and one that waits behind it."""
MAX_COMMITS_IN_FLIGHT = 64
"""Scripts without an answer beyond which no new step is planned: backpressure while Redis is away."""
MAX_LOOKAHEAD = 64
NOT_FINITE = Ending(FinishReason.ERROR, "INTERNAL", "the model's logits are not finite")


class Link(Protocol):
    """The worker's end of the stream."""

    async def send(self, plan: pb.StepPlan) -> None:
        """Hands a plan to the stream; raises ConnectionError where it is broken."""


@dataclass(slots=True)
class _Step:
    """A plan in flight."""

    step_id: int
    rows: list[ScheduledRow]
    num_tokens: int


@dataclass(slots=True)
class _Commit:
    """What is true once a script is acknowledged."""

    step_id: int = 0
    reply: "asyncio.Future[object] | None" = None
    logged: list[tuple[LiveRequest, int]] = field(default_factory=list)
    reserved: list[tuple[Sequence, int, int]] = field(default_factory=list)
    accepted: list[tuple[LiveRequest, "asyncio.Future[None]"]] = field(default_factory=list)
    ended: list[LiveRequest] = field(default_factory=list)


@dataclass(slots=True)
class EngineCounters:
    """Since the engine began."""

    num_steps: int = 0
    num_step_tokens: int = 0
    num_output_tokens: int = 0
    num_commits: int = 0
    phase_s: dict[str, float] = field(default_factory=lambda: {"apply": 0.0, "plan": 0.0, "commit": 0.0, "link": 0.0})


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    planner: Planner
    store: WorkerStore
    requests: RequestStore
    link: Link
    clock: StepClock
    redis_round_trip_s: Callable[[], float]
    on_end: Callable[[LiveRequest], None]
    """Called once the end of a request is recorded."""


class Engine:
    """Runs one worker. `lost` resolves with the reason once the worker, or the ownership of it, is gone."""

    def __init__(self, worker: str, parts: EngineParts, next_step_id: int) -> None:
        self.worker = worker
        self.planner = parts.planner
        self.store = parts.store
        self.clock = parts.clock
        self.counters = EngineCounters()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.live: dict[int, LiveRequest] = {}
        self._requests = parts.requests
        self._link = parts.link
        self._redis_round_trip_s = parts.redis_round_trip_s
        self._on_end = parts.on_end
        self._samplers: dict[int, pb.SamplerParams] = {}
        self._changes = parts.planner.blocks.changes
        self._commit_now = _Commit()
        self._commits: deque[_Commit] = deque()
        self._in_flight: deque[_Step] = deque()
        self._results: deque[pb.StepResult] = deque()
        self._endings: list[LiveRequest] = []
        self._must_grow = True
        self._next_step_id = next_step_id
        self._applied_step_id = next_step_id - 1
        self._committed_step_id = next_step_id - 1
        self._resent: set[int] = set()
        self._has_lost_ownership = False
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.poisons_freed_blocks = False

    # -- called from outside ------------------------------------------------------------------------------------------

    @property
    def owner(self) -> tuple[str, int]:
        """(worker, epoch), as a request's record names its owner."""
        return self.worker, self.store.epoch

    @property
    def committed_step_id(self) -> int:
        """Highest step whose result is in Redis."""
        return self._committed_step_id

    @property
    def is_lost(self) -> bool:
        """Whether nothing more will come of it."""
        return self.lost.done()

    def start(self) -> None:
        """Begins to plan."""
        self._spawn(self._run())
        self._wake.set()

    def expect_results(self, committed_step_id: int) -> None:
        """The worker will first send what an earlier owner planned and did not commit; nothing is planned before."""
        self._resent = set(range(committed_step_id + 1, self._next_step_id))
        self._applied_step_id = self._committed_step_id = committed_step_id

    def open(self, live: LiveRequest) -> "asyncio.Future[None]":
        """Takes a new or a moved request; it is durable under this worker's tag once the future is done."""
        sequence = live.sequence
        self.hold(live)
        self.planner.enqueue(sequence)
        self.describe(sequence)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._commit_now.accepted.append((live, accepted))
        self._must_grow = True
        self._wake.set()
        return accepted

    def hold(self, live: LiveRequest) -> None:
        """Makes a request this engine's, without queueing it."""
        self.live[live.sequence.seq_id] = live
        self._samplers[live.sequence.seq_id] = sampler_params(live.sequence, live.body.sampling)
        if live.ending is not None:
            self._endings.append(live)

    def describe(self, sequence: Sequence) -> None:
        """Writes what the sequence is into the next script."""
        self._changes.describe.append((sequence.seq_id, SequenceRow.of(sequence).pack()))

    def end(self, live: LiveRequest) -> None:
        """Carries out `live.ending` at the next step."""
        self._endings.append(live)
        self._wake.set()

    def close_row(self, seq_id: int) -> None:
        """Drops the row of a sequence that has ended."""
        self._changes.close.append(seq_id)

    def forget_row(self, seq_id: int) -> None:
        """Drops the row of a sequence that lives on under another worker's tag."""
        self._changes.forget.append(seq_id)

    def on_result(self, result: pb.StepResult) -> None:
        """Takes a result from the link."""
        self._results.append(result)
        self.clock.on_result(result.step_s, result.gap_s, result.back_to_back)
        self._wake.set()

    def on_dropped(self, step_ids: Iterable[int]) -> None:
        """Steps of an earlier owner that will have no result."""
        self._resent.difference_update(step_ids)
        self._wake.set()

    def lose(self, reason: str) -> None:
        """The worker is gone, or Redis says that it is another owner's."""
        if not self.lost.done():
            self.lost.set_result(reason)

    @property
    def has_lost_ownership(self) -> bool:
        """Whether Redis refused a script: what it holds is another owner's, or not what the mirror says."""
        return self._has_lost_ownership

    def _lose_ownership(self, error: BaseException) -> None:
        self._has_lost_ownership = True
        self.lose(f"ownership: {error}")

    async def retire(self) -> None:
        """Stops planning and waits until everything decided so far is in Redis."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._results.clear()
        self._send_commit()
        await asyncio.gather(
            *(commit.reply for commit in self._commits if commit.reply is not None), return_exceptions=True
        )
        await asyncio.sleep(0)  # their callbacks

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        phase_s = self.counters.phase_s
        while True:
            await self._wake.wait()
            self._wake.clear()
            t0 = perf_counter()
            self._apply_results()
            self._apply_endings()
            t1 = perf_counter()
            plans = self._plan_ahead()
            t2 = perf_counter()
            for plan in plans:
                await self._send(plan)
            t3 = perf_counter()
            self._reserve()
            t4 = perf_counter()
            self._send_commit()
            t5 = perf_counter()
            phase_s["apply"] += t1 - t0
            phase_s["plan"] += t2 - t1 + t4 - t3
            phase_s["link"] += t3 - t2
            phase_s["commit"] += t5 - t4

    def _lookahead(self) -> int:
        """Plans that leave while a reservation is on its way to Redis and back."""
        steps = self._redis_round_trip_s() / max(self.clock.step_s, 1e-4)
        return min(int(steps) + 2, MAX_LOOKAHEAD)

    def _reserve(self) -> None:
        if not self._must_grow:
            return
        self._must_grow = False
        self.planner.grow_and_admit(self._lookahead())
        for sequence in self.planner.redescribed:
            self.describe(sequence)
        self.planner.redescribed.clear()

    async def _send(self, plan: pb.StepPlan) -> None:
        try:
            await self._link.send(plan)
        except ConnectionError as error:
            self.lose(f"the stream broke: {error}")

    # -- plans --------------------------------------------------------------------------------------------------------

    def _plan_ahead(self) -> list[pb.StepPlan]:
        plans: list[pb.StepPlan] = []
        if self._resent or len(self._commits) >= MAX_COMMITS_IN_FLIGHT or self.is_lost:
            return plans
        while len(self._in_flight) < MAX_PLANS_IN_FLIGHT:
            rows = self.planner.schedule()
            if not rows:
                break
            numbers = StepNumbers(self.store.epoch, self._next_step_id, self._committed_step_id)
            plan = build_plan(numbers, rows, self.planner.removed, self._samplers)
            self.planner.removed.clear()
            if self.poisons_freed_blocks:
                plan.freed_block_ids.extend(self.planner.blocks.freed_block_ids)
            self.planner.blocks.freed_block_ids.clear()
            num_tokens = sum(row.num_tokens for row in rows)
            self._in_flight.append(_Step(self._next_step_id, rows, num_tokens))
            self.clock.on_plan(num_tokens)
            self._next_step_id += 1
            self._must_grow = True
            plans.append(plan)
        return plans

    # -- results ------------------------------------------------------------------------------------------------------

    def _apply_results(self) -> None:
        while self._results:
            self._must_grow = True
            result = self._results.popleft()
            if result.step_id in self._resent:
                self._apply_resent(result)
            elif self._in_flight and self._in_flight[0].step_id == result.step_id:
                self._apply_result(self._in_flight.popleft(), result)
            elif result.step_id > self._applied_step_id:
                return self.lose(f"result of step {result.step_id} out of order")
            else:
                continue  # a duplicate: counted once
            self._applied_step_id = max(self._applied_step_id, result.step_id)
            self.counters.num_steps += 1
        return None

    def _apply_result(self, step: _Step, result: pb.StepResult) -> None:
        if len(result.seq_ids) != len(step.rows):
            return self.lose(f"result of step {step.step_id} has {len(result.seq_ids)} rows, not {len(step.rows)}")
        token_ids = list(result.token_ids)
        failed = set(result.failed_seq_ids)
        at = 0
        for row, num_computed, first, count in zip(
            step.rows, result.num_computed_tokens, result.first_output_indexes, result.num_tokens, strict=True
        ):
            sequence = row.sequence
            tokens = token_ids[at : at + count]
            at += count
            sequence.num_plans_in_flight -= 1
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.attempt == row.attempt:
                self._advance(row, num_computed)
            if sequence.seq_id in failed:
                self._finish(self.live[sequence.seq_id], NOT_FINITE)
            elif tokens:
                self._append(sequence, first, tokens)
        self.counters.num_step_tokens += step.num_tokens
        return None

    def _advance(self, row: ScheduledRow, num_computed: int) -> None:
        """Confirmed progress of the present attempt; what the worker ran less than planned is planned again."""
        sequence = row.sequence
        if row.samples:
            sequence.num_planned_samples -= 1
        shortfall = row.num_tokens - (num_computed - sequence.num_computed_tokens)
        if shortfall:
            sequence.num_planned_tokens -= shortfall
        sequence.num_computed_tokens = num_computed
        if not row.samples:
            self._changes.computed.append((sequence.seq_id, num_computed))
            sequence.has_computed_record = True
            self.planner.publish_computed(sequence)
        elif sequence.has_computed_record:
            self._changes.computed.append((sequence.seq_id, -1))
            sequence.has_computed_record = False

    def _append(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        """Logs new tokens, as far as the sequence's end lets them survive."""
        live = self.live[sequence.seq_id]
        if first != sequence.num_output_tokens:
            return self.lose(f"tokens from {first} for a sequence that has {sequence.num_output_tokens}")
        reason: FinishReason | None = None
        num_kept = 0
        for token in tokens:
            sequence.token_ids.append(token)
            num_kept += 1
            reason = self._stop_reason(live, token)
            if reason is not None:
                break
        self.counters.num_output_tokens += num_kept
        self._changes.append.append((sequence.seq_id, first - sequence.segment_first_index, tokens[:num_kept]))
        self._commit_now.logged.append((live, first + num_kept))
        self.planner.publish_computed(sequence)
        if reason is not None:
            self._finish(live, Ending(reason))
        return None

    def _stop_reason(self, live: LiveRequest, token: int) -> FinishReason | None:
        sequence = live.sequence
        if token in sequence.limits.end_token_ids:
            return FinishReason.STOP
        if live.stop_text is not None:
            live.stop_text.push((token,))
            live.stop_text.take()
            if live.stop_text.stopped:
                return FinishReason.STOP
        if sequence.num_output_tokens >= sequence.limits.max_output_tokens:
            return FinishReason.LENGTH
        return None

    def _apply_resent(self, result: pb.StepResult) -> None:
        """A result of a step that an earlier owner planned: matched by sequence, attempt and index."""
        self._resent.discard(result.step_id)
        for row in result_rows(result):
            live = self.live.get(row.seq_id)
            if live is None or live.sequence.status is SequenceStatus.FINISHED:
                continue
            sequence = live.sequence
            fresh = row.token_ids[max(0, sequence.num_output_tokens - row.first_output_index) :]
            if sequence.attempt == row.attempt and row.num_computed_tokens > sequence.num_computed_tokens:
                sequence.num_computed_tokens = sequence.num_planned_tokens = row.num_computed_tokens
                self._changes.computed.append((row.seq_id, -1 if row.token_ids else row.num_computed_tokens))
                sequence.has_computed_record = not row.token_ids
            if fresh:
                self._append(sequence, sequence.num_output_tokens, fresh)
            elif sequence.status is SequenceStatus.RUNNING:
                self.planner.publish_computed(sequence)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _apply_endings(self) -> None:
        endings, self._endings = self._endings, []
        for live in endings:
            assert live.ending is not None
            if live.sequence.seq_id in self.live and live.sequence.status is not SequenceStatus.FINISHED:
                self._must_grow = True
                self._finish(live, live.ending)

    def _finish(self, live: LiveRequest, ending: Ending) -> None:
        self.planner.finish(live.sequence)
        if ending.reason is FinishReason.STOP:
            self.planner.lengths.add(live.sequence.num_output_tokens)
        live.ending = ending
        self._commit_now.ended.append(live)

    async def _record_end(self, live: LiveRequest) -> None:
        """The log is whole in Redis: now the record says so, then the client, and then the row may go."""
        sequence, ending = live.sequence, live.ending
        assert ending is not None
        end = EndState(ending.reason, sequence.num_cached_tokens or 0, ending.status, ending.error)
        try:
            held = await self._requests.end(sequence.request_id, self.owner, end.pack())
        except OwnershipLostError as error:
            return self._lose_ownership(error)
        live.end = EndState.unpack(held)
        self._changes.close.append(sequence.seq_id)
        del self.live[sequence.seq_id], self._samplers[sequence.seq_id]
        self._on_end(live)
        self._wake.set()
        return None

    # -- scripts ------------------------------------------------------------------------------------------------------

    def _send_commit(self) -> None:
        changes, commit = self._changes, self._commit_now
        if not changes and not commit.ended:
            return
        self._changes = self.planner.blocks.changes = Changes()
        self._commit_now = _Commit()
        commit.step_id = self._applied_step_id
        for seq_id, _, _ in changes.reserve:
            sequence = self.live[seq_id].sequence
            commit.reserved.append((sequence, sequence.attempt, len(sequence.block_ids)))
        commit.reply = self.store.commit(changes, commit.step_id)
        commit.reply.add_done_callback(self._on_commit)
        self._commits.append(commit)

    def _on_commit(self, reply: "asyncio.Future[object]") -> None:
        if reply.cancelled():
            return None
        error = reply.exception()
        if error is not None:
            return self._lose_ownership(error)
        was_full = len(self._commits) >= MAX_COMMITS_IN_FLIGHT
        commit = self._commits.popleft()
        self.counters.num_commits += 1
        self._committed_step_id = max(self._committed_step_id, commit.step_id)
        for sequence, attempt, num_blocks in commit.reserved:
            if sequence.attempt == attempt:
                sequence.num_acked_blocks = num_blocks
        for live, accepted in commit.accepted:
            live.is_accepted = True
            live.notify()
            if not accepted.done():
                accepted.set_result(None)
        for live, num_tokens in commit.logged:
            live.sequence.num_logged_tokens = num_tokens
            live.notify()
        for live in commit.ended:
            self._spawn(self._record_end(live))
        if commit.reserved or was_full:
            self._wake.set()
        return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the loop of %s failed", self.worker, exc_info=error)
            self.lose(f"our bug: {error!r}")
