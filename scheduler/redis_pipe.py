"""The scheduler's way to Redis: commands leave in the order in which they are queued, none waits for another's reply.

What is unanswered when a connection is lost is sent again, oldest first, so callers send only what may be repeated. The
order is kept for each key's slot: all that one worker's scripts touch lies in one.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scheduler.redis_node import REPLY_TIMEOUT_S, Command, RedisNode, Reply, Script


class Pipe(Protocol):
    """What the scheduler needs of a Redis, whatever that is made of."""

    def start(self) -> None:
        """Begins to send; needs a running loop."""

    async def close(self) -> None:
        """Drops all connections; unanswered futures are cancelled."""

    def call(self, script: Script, keys: Sequence[str | bytes], args: Sequence[object]) -> "asyncio.Future[Reply]":
        """Queues a script. The future raises ResponseError with one of VERDICTS where it refuses."""

    def send(self, verb: str, key: str | bytes, *words: object) -> "asyncio.Future[Reply]":
        """Queues one idempotent command. The future raises ResponseError where Redis refuses it."""

    def ping(self) -> None:
        """Asks for a sign of life, so that what stands still shows in `oldest_wait_s` while nobody asks for more."""

    @property
    def is_up(self) -> bool:
        """Whether all of it was reached by the last attempt."""

    @property
    def round_trip_s(self) -> float:
        """Moving average over replies, of the slowest part."""

    @property
    def oldest_wait_s(self) -> float:
        """Seconds that the oldest unanswered command has waited; 0 where none does."""


class RedisPipe:
    """A Pipe to one server."""

    def __init__(self, url: str, scripts: Sequence[Script] = ()) -> None:
        pool = ConnectionPool.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=REPLY_TIMEOUT_S,
        )
        self._node = RedisNode(pool, scripts)
        self._ping: asyncio.Future[Reply] | None = None

    def start(self) -> None:
        """See Pipe."""
        self._node.start()

    async def close(self) -> None:
        """See Pipe."""
        await self._node.close()

    def call(self, script: Script, keys: Sequence[str | bytes], args: Sequence[object]) -> "asyncio.Future[Reply]":
        """See Pipe."""
        command = Command.of(("EVALSHA", script.sha, len(keys), *keys, *args), is_script=True)
        self._node.put(command)
        return command.reply

    def send(self, verb: str, *words: object) -> "asyncio.Future[Reply]":
        """See Pipe."""
        command = Command.of((verb, *words))
        self._node.put(command)
        return command.reply

    def ping(self) -> None:
        """See Pipe."""
        if self._ping is None or self._ping.done():
            self._ping = self.send("PING")

    @property
    def is_up(self) -> bool:
        """See Pipe."""
        return self._node.is_up

    @property
    def round_trip_s(self) -> float:
        """See Pipe."""
        return self._node.round_trip_s

    @property
    def oldest_wait_s(self) -> float:
        """See Pipe."""
        return self._node.oldest_wait_s
