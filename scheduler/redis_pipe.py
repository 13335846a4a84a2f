"""One ordered connection to Redis on which commands are sent without waiting for the replies before them.

Owns the commands in flight: after a lost connection or a silent one, every unanswered command is sent again, oldest
first. Callers therefore send only what may be repeated: scripts that count themselves, and idempotent commands.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from time import perf_counter

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

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
class _Command:
    words: bytes
    is_script: bool
    reply: "asyncio.Future[Reply]"
    queued_at: float
    sent_at: float = 0.0


def _pack(words: Iterable[object]) -> bytes:
    """The command as the protocol's array of bulk strings."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    chunks = [b"*%d" % len(parts)]
    for part in parts:
        chunks += (b"$%d" % len(part), part)
    chunks.append(b"")
    return b"\r\n".join(chunks)


class RedisPipe:
    """A pipelined connection. `send` never blocks; futures resolve in order."""

    def __init__(self, url: str, scripts: Sequence[Script] = ()) -> None:
        self._pool = ConnectionPool.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=REPLY_TIMEOUT_S,
        )
        self._scripts = scripts
        self._unanswered: deque[_Command] = deque()
        self._unsent: deque[_Command] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_up = False
        """Whether Redis was reached by the last attempt."""
        self.round_trip_s = 0.0005
        """Moving average over replies."""

    def start(self) -> None:
        """Begins to send; needs a running loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Drops the connection; unanswered futures are cancelled."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for command in (*self._unanswered, *self._unsent):
            command.reply.cancel()
        self._unanswered.clear()
        self._unsent.clear()

    def call(self, script: Script, keys: Sequence[str | bytes], args: Sequence[object]) -> "asyncio.Future[Reply]":
        """Queues a script. The future raises ResponseError with one of VERDICTS where it refuses."""
        return self._queue(("EVALSHA", script.sha, len(keys), *keys, *args), is_script=True)

    def send(self, *words: object) -> "asyncio.Future[Reply]":
        """Queues one idempotent command. The future raises ResponseError where Redis refuses it."""
        return self._queue(words, is_script=False)

    def _queue(self, words: Iterable[object], *, is_script: bool) -> "asyncio.Future[Reply]":
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        command = _Command(_pack(words), is_script, reply, perf_counter())
        self._unsent.append(command)
        self._wake.set()
        return reply

    @property
    def oldest_wait_s(self) -> float:
        """Seconds that the oldest unanswered command has waited; 0 where none does."""
        waiting = self._unanswered or self._unsent
        return perf_counter() - waiting[0].queued_at if waiting else 0.0

    async def _run(self) -> None:
        while True:
            try:
                await self._serve_connection()
            except (RedisError, OSError, TimeoutError) as error:
                if self.is_up or not self._unsent:
                    log.warning("Redis is out of reach (%s); trying again", error)
                self.is_up = False
            self._unsent.extendleft(reversed(self._unanswered))
            self._unanswered.clear()
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
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError, RedisError, OSError, TimeoutError):
                    await reader
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
            if self._unanswered and perf_counter() - self._unanswered[0].sent_at > REPLY_TIMEOUT_S:
                raise TimeoutError(f"no reply within {REPLY_TIMEOUT_S} s")
            if not self._unsent:
                continue
            now = perf_counter()
            batch = [command for command in self._unsent if command.sent_at or not command.reply.cancelled()]
            self._unsent.clear()
            for command in batch:
                command.sent_at = now
            self._unanswered.extend(batch)
            await connection.send_packed_command([command.words for command in batch], check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            try:
                reply: Reply = await connection.read_response(disable_decoding=True)
                error = None
            except NoScriptError:
                raise
            except ResponseError as refusal:
                error = refusal
            command = self._unanswered[0]
            if error is not None and command.is_script and not str(error).startswith(VERDICTS):
                raise error
            self._unanswered.popleft()
            self.round_trip_s += 0.1 * (perf_counter() - command.sent_at - self.round_trip_s)
            if command.reply.done():
                continue
            if error is None:
                command.reply.set_result(reply)
            else:
                command.reply.set_exception(error)
