"""Simulated workers over one Redis or several nodes of a cluster, in lockstep.

One mirror (full_pool.py) decides for all of them; every worker gets each script under its own keys, from a WorkerStore
of its own, numbered (epoch, n) like any other. So thousands of full pools cost one in Python. The scheduler's pipe
does not follow a cluster's MOVED: a worker's pipe goes to the node that owns its keys.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

from scheduler.changes import Changes
from scheduler.keys import worker_key
from scheduler.redis_node import Reply
from scheduler.redis_pipe import RedisPipe
from scheduler.scripts import ALL_SCRIPTS
from scheduler.store import WorkerStore
from tests.load.full_pool import FullPool
from tests.redis_servers import RedisServer

LOG_TTL_S = 600
FILLING_IN_FLIGHT = 4
"""Scripts that fill a pool take long: more of them would not be answered in the time that a pipe waits."""


class Fleet:
    """`fill` first, then any number of rounds; used as an asynchronous context manager."""

    def __init__(self, nodes: Sequence[RedisServer], num_blocks: int, node_of: Callable[[str], int]) -> None:
        self.nodes = nodes
        self.pool = FullPool(num_blocks)
        self.stores: list[WorkerStore] = []
        self._node_of = node_of
        self._pipes = [RedisPipe(node.url, ALL_SCRIPTS) for node in nodes]
        self._num_rounds = 0

    async def __aenter__(self) -> "Fleet":
        for pipe in self._pipes:
            pipe.start()
            await pipe.send("PING")
        self._used_before = self._used_memory()
        return self

    async def __aexit__(self, *_: object) -> None:
        for pipe in self._pipes:
            await pipe.close()

    async def fill(self, num_workers: int) -> None:
        """Workers whose pools are full, by the scripts that fill one."""
        scripts = list(self.pool.fill())
        self.pool.check()
        for _ in range(num_workers):
            store = await self._seize_next()
            await store.reclaim("incarnation-1", self.pool.blocks.num_blocks)
            await _play(((store, changes) for changes in scripts), 0, FILLING_IN_FLIGHT)

    async def grow(self, used_bytes: int) -> None:
        """More workers, each a copy of the first one's keys, as long as the only node uses at most so much memory."""
        (node,) = self.nodes
        source = _tag(0)
        with node.client() as client:
            keys = [key.decode() for key in client.keys(f"{source}*")]
            per_worker = self.used_bytes / len(self.stores)
            while self._used_memory() + per_worker <= used_bytes:
                target = _tag(len(self.stores))
                with client.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.copy(key, target + key.removeprefix(source))
                    assert all(pipeline.execute())
                await self._seize_next()

    async def _seize_next(self) -> WorkerStore:
        number = len(self.stores)
        pipe = self._pipes[self._node_of(_tag(number))]
        store = WorkerStore(pipe, _name(number), LOG_TTL_S)
        await store.seize(0)
        self.stores.append(store)
        return store

    async def run(self, num_rows: int, num_rounds: int, num_in_flight: int) -> list[float]:
        """Decode steps of so many rows: a script for every worker in each round. Seconds until each was answered."""
        waits_s: list[float] = []
        for _ in range(num_rounds):
            self._num_rounds += 1
            changes = self.pool.step(num_rows)
            waits_s += await _play(((store, changes) for store in self.stores), self._num_rounds, num_in_flight)
        return waits_s

    async def check(self) -> None:
        """The mirror holds together, and Redis holds the same of the first, a middle and the last worker."""
        self.pool.check()
        for number in {0, len(self.stores) // 2, len(self.stores) - 1}:
            held = await self.stores[number].load()
            assert held == self.pool.image(), f"Redis and the mirror differ on {_name(number)}"

    def check_nodes(self) -> list[int]:
        """All keys of a worker lie on the node that was chosen for it. Returns workers by node."""
        found = []
        for node in self.nodes:
            with node.client() as client:
                found.append({key.partition(b"}")[0] for key in client.keys("*")})
        assert sum(map(len, found)) == len(self.stores) == len(set().union(*found)), "a worker on two nodes"
        return [len(tags) for tags in found]

    @property
    def used_bytes(self) -> int:
        """Memory of all nodes together, beside what they used empty and what connections use."""
        return self._used_memory() - self._used_before

    def _used_memory(self) -> int:
        total = 0
        for node in self.nodes:
            with node.client() as client:
                memory = client.info("memory")
            total += int(memory["used_memory"]) - int(memory["mem_clients_normal"])
        return total

    def bytes_by_part(self) -> dict[str, int]:
        """What the keys of the first worker take: its pool, its index, its logs together and so on."""
        parts: dict[str, int] = {}
        with self.nodes[self._node_of(_tag(0))].client() as client:
            for key in client.keys(f"{_tag(0)}*"):
                part = key.decode().split(":")[2]
                parts[part] = parts.get(part, 0) + client.memory_usage(key, samples=0)
        return parts


def _name(number: int) -> str:
    return f"worker-{number}"


def _tag(number: int) -> str:
    """What all keys of a worker begin with."""
    return worker_key(_name(number), "")


async def _play(
    scripts: Iterable[tuple[WorkerStore, Changes]], committed_step_id: int, num_in_flight: int
) -> list[float]:
    """Sends scripts, so many at most without an answer. Seconds of each; raises where one is refused."""
    waits_s: list[float] = []
    unanswered: deque[tuple[float, asyncio.Future[Reply]]] = deque()

    async def answer() -> None:
        began, reply = unanswered.popleft()
        assert await reply in (b"ok", b"done")  # done: it was slow, the pipe sent it again
        waits_s.append(perf_counter() - began)

    for store, changes in scripts:
        unanswered.append((perf_counter(), store.commit(changes, committed_step_id)))
        if len(unanswered) == num_in_flight:
            await answer()
    while unanswered:
        await answer()
    return waits_s
