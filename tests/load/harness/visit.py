"""One request's stream, read to its end, or to where its client leaves, and told apart by how it went."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

from tests.load.harness.backend import Backend, Call, CallError, Chunk
from tests.load.harness.records import Outcome, Record
from tests.load.harness.settings import Leavers
from tests.load.harness.workload import Leave


class Visit:
    """Fills in one record."""

    def __init__(self, backend: Backend, call: Call, record: Record, leave: Leave, leavers: Leavers) -> None:
        self.answer: list[int] = []
        self._backend = backend
        self._call = call
        self._record = record
        self._leave = leave
        self._leavers = leavers
        self._cancelling: asyncio.Task[None] | None = None

    async def run(self, count_tokens: Callable[[int], None]) -> None:
        """Fills in the record; raises nothing that the server or the way to it did."""
        record = self._record
        try:
            leave_at_s = self._leavers.after_s if self._leave is not Leave.STAYS else None
            if leave_at_s is not None and self._leave is Leave.CANCELS:
                asyncio.get_running_loop().call_later(leave_at_s, self._cancel)
            async with asyncio.timeout(leave_at_s if self._leave is Leave.DISCONNECTS else None):
                await self._read(count_tokens)
        except TimeoutError:
            record.outcome = Outcome.DISCONNECTED
        except CallError as error:
            record.end_s = time.monotonic()
            record.status, record.detail, record.retry_after_s = error.status, error.detail, error.retry_after_s
        except asyncio.CancelledError:
            record.outcome = Outcome.DISCONNECTED
            raise
        finally:
            if self._cancelling is not None:
                await asyncio.gather(self._cancelling, return_exceptions=True)

    async def _read(self, count_tokens: Callable[[int], None]) -> None:
        record, chunks = self._record, self._backend.stream(self._call)
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.num_tokens:
                    record.chunk_times_s.append(time.monotonic())
                    record.chunk_tokens.append(chunk.num_tokens)
                    record.num_output_tokens += chunk.num_tokens
                    count_tokens(chunk.num_tokens)
                    self.answer += chunk.token_ids
                self._take_end(chunk)
                if self._is_to_leave() and self._leave is Leave.DISCONNECTS and chunk.usage is None:
                    record.outcome = Outcome.DISCONNECTED
                    return
        record.end_s = time.monotonic()
        if record.outcome is Outcome.FAILED and not record.status:
            record.outcome = Outcome.COMPLETED

    def _take_end(self, chunk: Chunk) -> None:
        record = self._record
        if chunk.usage is not None:
            record.num_prompt_tokens, record.num_cached_tokens, record.num_output_tokens = chunk.usage
        if chunk.was_aborted and self._cancelling is not None:
            record.outcome = Outcome.CANCELLED
        elif chunk.was_aborted:
            record.status, record.detail = "ABORTED", "the server ended it, and we had not asked for that"

    def _is_to_leave(self) -> bool:
        """Whether it is time; asks the server where that is how it leaves."""
        after_tokens = self._leavers.after_tokens
        is_time = after_tokens is not None and self._record.num_output_tokens >= after_tokens
        if is_time and self._leave is Leave.CANCELS:
            self._cancel()
        return is_time

    def _cancel(self) -> None:
        if self._cancelling is None and not self._record.end_s:
            self._cancelling = asyncio.create_task(self._backend.cancel(self._call.request_id))
