"""A network that a test holds in its hands: scripts wait in it until they are delivered, lost, doubled or reordered.

Redis behind it is real. Only numbered scripts wait; reads and seizures pass straight through.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import ResponseError

from scheduler.redis_node import Reply, Script
from scheduler.redis_pipe import RedisPipe
from scheduler.scripts import RECLAIM, STEP


@dataclass(slots=True, eq=False)
class Message:
    """One numbered script on its way."""

    script: Script
    keys: tuple[str, ...]
    args: tuple[object, ...]
    reply: "asyncio.Future[Reply]"
    is_applied: bool = False

    @property
    def n(self) -> int:
        """Its number."""
        assert isinstance(self.args[1], int)
        return self.args[1]


class FaultyWire(RedisPipe):
    """Has the face of a RedisPipe and sends through one."""

    def __init__(self, pipe: RedisPipe, loop: asyncio.AbstractEventLoop) -> None:  # no connection of its own
        self._inner = pipe
        self._loop = loop
        self.unanswered: deque[Message] = deque()
        self.answered: list[Message] = []

    def call(self, script: Script, keys: Sequence[str], args: Sequence[object]) -> "asyncio.Future[Reply]":
        """Holds a numbered script back; sends any other at once."""
        if script not in (STEP, RECLAIM):
            return self._inner.call(script, keys, args)
        message = Message(script, tuple(keys), tuple(args), self._loop.create_future())
        self.unanswered.append(message)
        return message.reply

    def send(self, *words: object) -> "asyncio.Future[Reply]":
        """Straight through."""
        return self._inner.send(*words)

    async def deliver(self, message: Message) -> object:
        """Redis sees a message; returns its answer, or the ResponseError with which it refuses."""
        try:
            return await self._inner.call(message.script, message.keys, message.args)
        except ResponseError as error:
            return error

    @property
    def num_unapplied(self) -> int:
        """Scripts that Redis has not seen."""
        return sum(not message.is_applied for message in self.unanswered)

    async def apply_next(self) -> None:
        """Redis applies the oldest script that it has not seen, and its reply is lost."""
        message = next(m for m in self.unanswered if not m.is_applied)
        answer = await self.deliver(message)
        assert answer == b"ok", f"script {message.n}: {answer}"
        message.is_applied = True

    async def answer_oldest(self) -> Message:
        """The oldest unanswered script is sent (again, where its reply was lost), and is answered."""
        message = self.unanswered[0]
        expected = b"done" if message.is_applied else b"ok"
        answer = await self.deliver(message)
        assert answer == expected, f"script {message.n}: {answer}"
        message.is_applied = True
        self.unanswered.popleft()
        self.answered.append(message)
        message.reply.set_result(expected)
        return message
