"""One generator process's part of a run: sends what is due, when it is due, and writes down what comes back.

An open loop never waits for an answer. A request's latency counts from when it was due; that this process itself came
late shows in its records and its loop's lag, and is part of the latency all the same.
"""

import asyncio
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from tests.load.harness.backend import Backend, Call
from tests.load.harness.plan import Plan, Share
from tests.load.harness.records import Generation, Outcome, Record
from tests.load.harness.settings import Settings
from tests.load.harness.visit import Visit
from tests.load.harness.workload import Conversation, Turn

LAG_INTERVAL_S = 0.02
_WARMUP_INDEX = 1 << 40
"""Far from any conversation of a run, so that its prompt is none of theirs."""


@dataclass(slots=True)
class Counts:
    """How far a generator is; its parent shows the sum."""

    num_sent: int = 0
    num_running: int = 0
    num_completed: int = 0
    num_left: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    worst_late_s: float = 0.0


class Generator:
    """Runs one share of a plan on one backend."""

    def __init__(self, settings: Settings, plan: Plan, share: Share, backend: Backend, run_id: str) -> None:
        """`run_id` makes request ids that no other run has."""
        self.counts = Counts()
        self._settings = settings
        self._plan = plan
        self._share = share
        self._backend = backend
        self._run_id = run_id
        self._records: list[Record] = []
        self._lags_s = array("d")
        concurrency = settings.pace.max_concurrency
        self._num_places = None if concurrency is None else share.part_of(concurrency)
        self._places = asyncio.Semaphore(self._num_places or 1)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begins nothing more, and leaves what runs."""
        self._stopping.set()

    async def warm_up(self, num_requests: int) -> None:
        """Requests that count for nothing, one after the other."""
        for number in range(num_requests):
            turn = self._plan.workload.conversation(_WARMUP_INDEX + number).turns[0]
            call = Call(f"{self._run_id}-warm-{self._share.number}-{number}", turn.token_ids, turn.max_tokens)
            async for _ in self._backend.stream(call):
                pass

    async def run(self, start_s: float) -> Generation:
        """From `start_s` (monotonic) until every request has ended."""
        await _sleep_until(start_s)
        cpu_s, lag_task = time.process_time(), asyncio.create_task(self._watch_lag())
        work = asyncio.create_task(
            self._run_open(start_s) if self._plan.due_s is not None else self._run_closed(start_s)
        )
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (work, stopping, lag_task):
            if not task.done():
                task.cancel()
        results = await asyncio.gather(work, stopping, lag_task, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]
        cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - start_s
        return Generation(self._records, cpu_s, wall_s, self._lags_s, self._stopping.is_set())

    # -- pace ---------------------------------------------------------------------------------------------------------

    async def _run_open(self, start_s: float) -> None:
        """Each conversation when it is due, whatever became of those before."""
        assert self._plan.due_s is not None
        async with asyncio.TaskGroup() as tasks:
            for index in self._share.indexes(self._plan):
                conversation = self._plan.workload.conversation(index)  # before its time: drawing it takes some
                due_s = start_s + float(self._plan.due_s[index])
                await _sleep_until(due_s)
                tasks.create_task(self._converse(conversation, due_s, is_paced=self._num_places is None))

    async def _run_closed(self, start_s: float) -> None:
        """As many conversations at once as there are places; the next is due when one is free."""
        indexes = self._share.indexes(self._plan)
        assert self._num_places is not None
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._num_places):
                tasks.create_task(self._keep_place_busy(indexes, start_s))

    async def _keep_place_busy(self, indexes: Iterator[int], start_s: float) -> None:
        duration_s = self._settings.pace.duration_s
        for index in indexes:
            conversation = self._plan.workload.conversation(index)
            due_s = time.monotonic()
            if duration_s is not None and due_s - start_s >= duration_s:
                return
            await self._converse(conversation, due_s, is_paced=False)

    # -- conversations ------------------------------------------------------------------------------------------------

    async def _converse(self, conversation: Conversation, due_s: float, is_paced: bool) -> None:
        """Turn after turn; ends with the first one that is not answered in full."""
        said: list[int] = []
        for number, turn in enumerate(conversation.turns):
            if number:
                due_s += turn.think_s
                await _sleep_until(due_s)
            said += turn.token_ids
            record = Record(conversation.index, number, due_s, is_paced=is_paced or number > 0)
            answer = await self._request(record, turn, said, len(conversation.turns) > 1)
            if record.outcome is not Outcome.COMPLETED:
                return
            said += answer
            due_s = record.end_s

    async def _request(self, record: Record, turn: Turn, prompt: list[int], needs_ids: bool) -> list[int]:
        """One request, counted; the ids of its answer, where they are known and wanted."""
        if self._plan.due_s is None or self._num_places is None:
            return await self._send(record, turn, prompt, needs_ids)
        async with self._places:
            return await self._send(record, turn, prompt, needs_ids)

    async def _send(self, record: Record, turn: Turn, prompt: list[int], needs_ids: bool) -> list[int]:
        request_id = f"{self._run_id}-{record.index}-{record.turn}"
        call = Call(request_id, list(prompt), turn.max_tokens, needs_ids)
        record.num_prompt_tokens, record.sent_s = len(prompt), time.monotonic()
        if record.is_paced:
            self.counts.worst_late_s = max(self.counts.worst_late_s, record.sent_s - record.due_s)
        self.counts.num_sent += 1
        self.counts.num_running += 1
        visit = Visit(self._backend, call, record, turn.leave, self._settings.leavers)
        try:
            await visit.run(self._count_tokens)
        finally:
            record.end_s = record.end_s or time.monotonic()
            self._records.append(record)
            self.counts.num_running -= 1
            self._count_outcome(record.outcome)
        return visit.answer

    def _count_tokens(self, num_tokens: int) -> None:
        self.counts.num_output_tokens += num_tokens

    def _count_outcome(self, outcome: Outcome) -> None:
        if outcome is Outcome.COMPLETED:
            self.counts.num_completed += 1
        elif outcome is Outcome.FAILED:
            self.counts.num_failed += 1
        else:
            self.counts.num_left += 1

    async def _watch_lag(self) -> None:
        """How late timers are: what this loop was busy with meanwhile shows in every time it takes down."""
        while True:
            due_s = time.monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lags_s.append(time.monotonic() - due_s)


async def _sleep_until(at_s: float) -> None:
    """Returns at a moment of the monotonic clock, or at once where that is over."""
    delay_s = at_s - time.monotonic()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
