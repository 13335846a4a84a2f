"""A Pipe to a Redis Cluster: one ordered connection per node, each slot's commands in order wherever the slot goes.

Owns which node a slot's commands are sent to. A slot that is on its way elsewhere is held: from the first command that
a node did not execute, the replies to all later ones of that slot are void; when the node has answered the last, all
are sent again, oldest first, where the slot is now. So none overtakes another, even where a slot comes back meanwhile.
While a slot is moved key by key, what the old node sends away goes alone to the new one (ASK), and what finds its keys
on both waits (TRYAGAIN).

What a node says of its own slots (MOVED) is believed. A list of owners, which may lag, is asked for only where a node
is out of reach: then its slots may be another's by now.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError, TryAgainError

from scheduler.redis_node import REPLY_TIMEOUT_S, RETRY_DELAY_S, Command, RedisNode, Reply, Script
from scheduler.redis_slots import Address, ClusterUrl, fetch_owners
from scheduler.tasks import end

log = logging.getLogger("pagoda.redis")

REFRESH_DELAY_S = 0.2
"""Between two questions for the owners, while a node is out of reach or a slot has none."""
NO_SLOT = -1
"""Of a command that is meant for a certain node."""
_NOT_EXECUTED = (AskError, TryAgainError, ClusterDownError)
"""MovedError is an AskError to redis-py."""


@dataclass(slots=True, eq=False)
class _HeldSlot:
    """A slot whose commands are kept back until nothing of it is on its way."""

    reason: ResponseError | None
    """What the oldest command was told that was not executed; None where none is left."""
    returned: deque[Command] = field(default_factory=deque)
    """To be sent again, oldest first."""
    waiting: deque[Command] = field(default_factory=deque)
    """Not sent yet; behind those."""
    asked: Command | None = None
    """The oldest, on its way alone to the node that the slot is being moved to."""
    asking: Command | None = None
    """What lets it in there."""

    def take_back(self, command: Command, answer: Reply) -> None:
        """A command of the slot was answered, or its connection lost; only the one that was asked has an answer."""
        if command is self.asked:
            self.asked = None
            if isinstance(answer, _NOT_EXECUTED) or command.is_outage(answer):
                assert isinstance(answer, ResponseError)
                self.reason = answer
                self.returned.appendleft(command)
            else:
                command.settle(answer)
        elif command is not self.asking:
            self.returned.append(command)


class ClusterPipe:
    """See Pipe."""

    def __init__(self, url: str, scripts: Sequence[Script] = ()) -> None:
        self._url = ClusterUrl(url)
        self._scripts = scripts
        self._nodes: dict[Address, RedisNode] = {}
        self._owners: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._held: dict[int, _HeldSlot] = {}
        self._homeless: deque[Command] = deque()  # of slots of which no owner is known
        self._pings: dict[RedisNode, Command] = {}
        self._wants_owners = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # -- as a Pipe ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See Pipe."""
        self._task = asyncio.create_task(self._follow_owners())

    async def close(self) -> None:
        """See Pipe."""
        if self._task is not None:
            await end(self._task)
        for command in self._kept():
            command.reply.cancel()
        self._held.clear()
        for node in self._nodes.values():
            await node.close()

    def call(self, script: Script, keys: Sequence[str | bytes], args: Sequence[object]) -> "asyncio.Future[Reply]":
        """See Pipe."""
        words = ("EVALSHA", script.sha, len(keys), *keys, *args)
        return self._route(Command.of(words, is_script=True, slot=_slot_of(keys[0])))

    def send(self, verb: str, key: str | bytes, *words: object) -> "asyncio.Future[Reply]":
        """See Pipe."""
        return self._route(Command.of((verb, key, *words), slot=_slot_of(key)))

    def ping(self) -> None:
        """See Pipe."""
        for node in self._nodes.values():
            if node not in self._pings or self._pings[node].reply.done():
                self._pings[node] = Command.of(("PING",), slot=NO_SLOT)
                node.put(self._pings[node])

    @property
    def is_up(self) -> bool:
        """See Pipe."""
        return bool(self._nodes) and all(node.is_up for node in self._nodes.values())

    @property
    def round_trip_s(self) -> float:
        """See Pipe."""
        return max((node.round_trip_s for node in self._nodes.values()), default=0.0)

    @property
    def oldest_wait_s(self) -> float:
        """See Pipe."""
        now = perf_counter()
        kept = (now - command.queued_at for command in self._kept())
        return max(chain(kept, (node.oldest_wait_s for node in self._nodes.values())), default=0.0)

    # -- as the nodes' Router -----------------------------------------------------------------------------------------

    def takes(self, node: RedisNode, command: Command, answer: Reply) -> bool:
        """See Router: an answer that sends the command elsewhere, and every answer of a slot that is held."""
        held = self._held.get(command.slot) if self._held else None
        if held is None:
            if not isinstance(answer, _NOT_EXECUTED):
                return False
            held = self._held[command.slot] = _HeldSlot(answer, waiting=_pull(node, command.slot))
        held.take_back(command, answer)
        self._go_on(node, command.slot, held)
        return True

    def lost(self, node: RedisNode) -> None:
        """See Router: what it had of held slots comes back, in order."""
        for slot, held in list(self._held.items()):
            pulled = _pull(node, slot)
            for command in pulled:
                held.take_back(command, TryAgainError("the connection was lost"))
            if pulled:
                self._go_on(node, slot, held)
        self._wants_owners.set()

    def _go_on(self, node: RedisNode, slot: int, held: _HeldSlot) -> None:
        """Once nothing of the slot is on its way, does what its oldest command was told. `node`: who told it."""
        nodes = self._nodes.values()
        if any(command.slot == slot for other in nodes for command in chain(other.unanswered, other.unsent)):
            return
        reason = held.reason
        if isinstance(reason, MovedError):
            self._owners[slot] = self._node_at(reason, node)
            self._release(slot, held)
        elif isinstance(reason, AskError):
            self._ask(self._node_at(reason, node), slot, held)
        elif reason is None:
            self._release(slot, held)
        else:
            asyncio.get_running_loop().call_later(RETRY_DELAY_S, self._release, slot, held)

    def _ask(self, node: RedisNode, slot: int, held: _HeldSlot) -> None:
        """Sends the oldest command alone; the others begin at the slot's owner again, where their keys may still be."""
        held.reason = None
        held.asking, held.asked = Command.of(("ASKING",), slot=slot), held.returned.popleft()
        node.put(held.asking)
        node.put(held.asked)

    def _release(self, slot: int, held: _HeldSlot) -> None:
        if self._held.get(slot) is held:
            del self._held[slot]
            for command in chain(held.returned, held.waiting):
                self._route(command)

    # -- where commands go --------------------------------------------------------------------------------------------

    def _route(self, command: Command) -> "asyncio.Future[Reply]":
        node = self._owners[command.slot]
        if self._held and command.slot in self._held:
            self._held[command.slot].waiting.append(command)
        elif node is None:
            self._homeless.append(command)
        else:
            node.put(command)
        return command.reply

    def _node(self, address: Address) -> RedisNode:
        """The node there; one that is new is connected to."""
        node = self._nodes.get(address)
        if node is None:
            log.info("connecting to %s:%d", *address)
            node = RedisNode(self._url.pool(address, None, REPLY_TIMEOUT_S), self._scripts, self)
            self._nodes[address] = node
            node.start()
        return node

    def _node_at(self, redirection: AskError, teller: RedisNode) -> RedisNode:
        host: str = redirection.host or next(host for (host, _), node in self._nodes.items() if node is teller)
        return self._node((host, redirection.port))

    async def _follow_owners(self) -> None:
        """Asks for the owners at first, and as long as any node is out of reach."""
        while True:
            self._wants_owners.clear()
            up = [address for address, node in self._nodes.items() if node.is_up]
            await self._adopt(await fetch_owners(self._url, up or self._nodes))
            if self.is_up and not self._homeless:
                await self._wants_owners.wait()
            await asyncio.sleep(REFRESH_DELAY_S)

    async def _adopt(self, owners: Sequence[tuple[range, Address]]) -> None:
        """Slots without an owner, and those of nodes out of reach, go where the list says, with all their commands."""
        for slots, address in owners:
            for slot in slots:
                owner = self._owners[slot]
                if owner is None or (not owner.is_up and owner is not self._nodes.get(address)):
                    self._owners[slot] = self._node(address)
        homeless, self._homeless = self._homeless, deque()
        for command in homeless:
            self._route(command)
        for address, node in list(self._nodes.items()):
            if node.is_up:
                continue  # what it has is on its way: it says itself where that is to go
            commands, node.unsent = node.unsent, deque()
            for command in commands:
                stays = command.slot in self._held or command.slot == NO_SLOT or self._owners[command.slot] is node
                if stays:
                    node.unsent.append(command)
                else:
                    self._route(command)
            if node not in self._owners and all(command.slot == NO_SLOT for command in node.unsent):
                log.info("%s:%d owns nothing any more", *address)
                del self._nodes[address]
                self._pings.pop(node, None)
                await node.close()

    def _kept(self) -> list[Command]:
        """Commands that no node has."""
        return [*self._homeless, *chain.from_iterable((*h.returned, *h.waiting) for h in self._held.values())]


def _slot_of(key: str | bytes) -> int:
    return key_slot(key if isinstance(key, bytes) else key.encode())


def _pull(node: RedisNode, slot: int) -> deque[Command]:
    """What a node has not sent yet of a slot; it has it no more."""
    pulled = deque(command for command in node.unsent if command.slot == slot)
    if pulled:
        node.unsent = deque(command for command in node.unsent if command.slot != slot)
    return pulled
