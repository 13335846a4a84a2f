"""One ordered connection to one Redis server, on which commands are sent without waiting for the replies before them.

Owns the commands in flight there: after a lost connection or a silent one, every unanswered command is sent again,
oldest first. Callers therefore send only what may be repeated: scripts that count themselves, and idempotent commands.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from time import perf_counter
from typing import Protocol

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import NoScriptError, RedisError, ResponseError

from scheduler.tasks import end

log = logging.getLogger("pagoda.redis")

Reply = object
"""What Redis answers: bytes, int, list or None."""

REPLY_TIMEOUT_S = 2.0
RETRY_DELAY_S = 0.05
VERDICTS = ("STALE", "GAP", "REFUSED")
"""How our scripts refuse; any other error of a script is an outage, and the script is sent again."""


class Script:
    """A Lua script, called by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode()).hexdigest()


@dataclass(slots=True, eq=False)
class Command:
    """What is to be sent until it is answered."""

    words: bytes
    is_script: bool
    reply: "asyncio.Future[Reply]"
    queued_at: float
    slot: int = 0
    """Of its key, in a cluster."""
    sent_at: float = 0.0

    @classmethod
    def of(cls, words: Iterable[object], *, is_script: bool = False, slot: int = 0) -> "Command":
        """A new one, with a future that raises ResponseError where Redis refuses it."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        return cls(_pack(words), is_script, reply, perf_counter(), slot)

    def is_outage(self, answer: Reply) -> bool:
        """Whether it was not executed, for no fault of its own: it is sent again."""
        is_error = isinstance(answer, ResponseError)
        return is_error and self.is_script and not str(answer).startswith(VERDICTS)

    def settle(self, answer: Reply) -> None:
        """It is answered, once and for all."""
        if self.reply.done():
            return
        if isinstance(answer, ResponseError):
            self.reply.set_exception(answer)
        else:
            self.reply.set_result(answer)


def _pack(words: Iterable[object]) -> bytes:
    """The command as the protocol's array of bulk strings."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    chunks = [b"*%d" % len(parts)]
    for part in parts:
        chunks += (b"$%d" % len(part), part)
    chunks.append(b"")
    return b"\r\n".join(chunks)


class Router(Protocol):
    """Who knows more than one node."""

    def takes(self, node: "RedisNode", command: Command, answer: Reply) -> bool:
        """Whether an answer is not the command's own, and the command the router's again."""

    def lost(self, node: "RedisNode") -> None:
        """The connection is gone; all that was unanswered is queued again."""


class RedisNode:
    """A pipelined connection that is opened again whenever it is lost. Replies come in order."""

    def __init__(self, pool: ConnectionPool, scripts: Sequence[Script], router: Router | None = None) -> None:
        self.is_up = False
        """Whether Redis was reached by the last attempt."""
        self.round_trip_s = 0.0005
        """Moving average over replies."""
        self.unanswered: deque[Command] = deque()
        self.unsent: deque[Command] = deque()
        self._pool = pool
        self._scripts = scripts
        self._router = router
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to send; needs a running loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Drops the connection; unanswered futures are cancelled."""
        if self._task is not None:
            await end(self._task)
        for command in (*self.unanswered, *self.unsent):
            command.reply.cancel()
        self.unanswered.clear()
        self.unsent.clear()

    def put(self, command: Command) -> None:
        """Queues it behind all others."""
        self.unsent.append(command)
        self._wake.set()

    @property
    def oldest_wait_s(self) -> float:
        """Seconds that the oldest unanswered command has waited; 0 where none does."""
        waiting = self.unanswered or self.unsent
        return perf_counter() - waiting[0].queued_at if waiting else 0.0

    async def _run(self) -> None:
        while True:
            try:
                await self._serve_connection()
            except (RedisError, OSError, TimeoutError) as error:
                if self.is_up or not self.unsent:
                    log.warning("Redis is out of reach (%s); trying again", error)
                self.is_up = False
            self.unsent.extendleft(reversed(self.unanswered))
            self.unanswered.clear()
            if self._router is not None:
                self._router.lost(self)
            await asyncio.sleep(RETRY_DELAY_S)

    async def _serve_connection(self) -> None:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):  # else a network that swallows packets would hold it for ever
                await connection.connect()  # type: ignore[no-untyped-call]
                for script in self._scripts:
                    await connection.send_command("SCRIPT", "LOAD", script.text)
                    await connection.read_response()
            self.is_up = True
            reader = asyncio.create_task(self._read(connection))
            reader.add_done_callback(lambda _: self._wake.set())
            try:
                await self._write(connection, reader)
            finally:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await end(reader)
        finally:
            await connection.disconnect(nowait=True)

    async def _write(self, connection: AbstractConnection, reader: "asyncio.Task[None]") -> None:
        """Sends what is queued until the reader ends or falls silent; raises what ended it."""
        self._wake.set()
        while True:
            watchdog = asyncio.get_running_loop().call_later(REPLY_TIMEOUT_S / 4, self._wake.set)
            await self._wake.wait()
            watchdog.cancel()
            self._wake.clear()
            if reader.done():
                return reader.result()
            if self.unanswered and perf_counter() - self.unanswered[0].sent_at > REPLY_TIMEOUT_S:
                raise TimeoutError(f"no reply within {REPLY_TIMEOUT_S} s")
            if not self.unsent:
                continue
            now = perf_counter()
            batch = [command for command in self.unsent if command.sent_at or not command.reply.cancelled()]
            self.unsent.clear()
            for command in batch:
                command.sent_at = now
            self.unanswered.extend(batch)
            await connection.send_packed_command([command.words for command in batch], check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        router = self._router
        while True:
            try:
                answer: Reply = await connection.read_response(disable_decoding=True)
            except NoScriptError:
                raise
            except ResponseError as refusal:
                answer = refusal
            command = self.unanswered.popleft()
            self.round_trip_s += 0.1 * (perf_counter() - command.sent_at - self.round_trip_s)
            if router is not None and router.takes(self, command, answer):
                continue
            if command.is_outage(answer):
                self.unanswered.appendleft(command)
                raise answer  # type: ignore[misc]
            command.settle(answer)
