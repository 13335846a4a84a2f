"""The pipe through servers that forget scripts, die, freeze, run out of memory or vanish behind a network.

Every test sends numbered scripts all the while and asserts afterwards that each was applied once, in order.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from scheduler.changes import Changes
from scheduler.keys import log_key, worker_key
from scheduler.redis_pipe import RedisPipe
from scheduler.scripts import ALL_SCRIPTS
from scheduler.store import WorkerStore
from tests.redis.redis_dump import dump, parse_u32
from tests.redis_servers import RedisServer

WORKER = "worker-0"
NUM_SCRIPTS = 200
REPLY_TIMEOUT_S = 0.3
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that gives a silent server up sooner, so that tests take less time."""
    monkeypatch.setattr("scheduler.redis_node.REPLY_TIMEOUT_S", REPLY_TIMEOUT_S)


@contextlib.asynccontextmanager
async def piped(url: str) -> AsyncIterator[tuple[RedisPipe, WorkerStore]]:
    """A pipe and a seized worker with an empty pool."""
    pipe = RedisPipe(url, ALL_SCRIPTS)
    pipe.start()
    try:
        store = WorkerStore(pipe, WORKER, 600)
        await store.seize(0)
        await store.reclaim("incarnation-1", 8)
        yield pipe, store
    finally:
        await pipe.close()


async def send_through(store: WorkerStore, harm: Callable[[], Awaitable[None]]) -> None:
    """One token per script, while the harm is done in the middle; every script must be answered in the end."""
    replies: list[asyncio.Future[object]] = []
    harming: asyncio.Task[None] | None = None
    for i in range(NUM_SCRIPTS):
        replies.append(store.commit(Changes(append=[(1, i, [i])], reserve=_toggled(i), release=_released(i)), i))
        if i == NUM_SCRIPTS // 3:
            await replies[0]
            harming = asyncio.ensure_future(harm())
        await asyncio.sleep(0.001)
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*replies)
        assert harming is not None
        await harming
    assert set(answers) <= {b"ok", b"done"}


def _toggled(i: int) -> list[tuple[int, list[tuple[int, bytes]], list[int]]]:
    """Takes a block in every second script: applied twice, it would be refused."""
    return [(2, [], [1 + i % 8])] if i % 2 == 0 else []


def _released(i: int) -> list[int]:
    return [2] if i % 2 else []


def assert_each_applied_once(server: RedisServer) -> None:
    """The log is whole, the count exact."""
    with server.client() as client:
        assert parse_u32(client.get(log_key(WORKER, 1))) == list(range(NUM_SCRIPTS))
        meta = client.hgetall(worker_key(WORKER, "meta"))
    assert (meta[b"n"], meta[b"committed_step_id"]) == (b"%d" % (NUM_SCRIPTS + 1), b"%d" % (NUM_SCRIPTS - 1))


async def test_scripts_are_loaded_again_when_the_server_forgot_them(server: RedisServer) -> None:
    async def forget() -> None:
        with server.client() as client:
            client.script_flush()

    async with piped(server.url) as (_, store):
        await send_through(store, forget)
    assert_each_applied_once(server)


async def test_a_killed_server_comes_back_with_everything(own_server: RedisServer) -> None:
    async def kill_and_restart() -> None:
        own_server.kill()
        await asyncio.sleep(0.1)
        await asyncio.to_thread(own_server.start)

    async with piped(own_server.url) as (pipe, store):
        await send_through(store, kill_and_restart)
        assert pipe.is_up
    assert_each_applied_once(own_server)


async def test_a_server_killed_again_and_again(own_server: RedisServer) -> None:
    async def kill_and_restart() -> None:
        for _ in range(4):
            own_server.kill()
            await asyncio.to_thread(own_server.start)
            await asyncio.sleep(0.02)

    async with piped(own_server.url) as (_, store):
        await send_through(store, kill_and_restart)
    assert_each_applied_once(own_server)


@pytest.mark.parametrize("num_timeouts", [0.3, 3.5])
async def test_a_frozen_server_gets_every_script_twice_and_applies_it_once(
    own_server: RedisServer, num_timeouts: float
) -> None:
    """What waits in its sockets is still read after SIGCONT, beside all that was sent again meanwhile."""

    async def freeze() -> None:
        own_server.stop()
        await asyncio.sleep(num_timeouts * REPLY_TIMEOUT_S)
        own_server.resume()

    async with piped(own_server.url) as (pipe, store):
        await send_through(store, freeze)
        assert pipe.is_up
    assert_each_applied_once(own_server)


async def test_a_frozen_server_that_is_killed_at_last(own_server: RedisServer) -> None:
    async def freeze_and_kill() -> None:
        own_server.stop()
        await asyncio.sleep(2.5 * REPLY_TIMEOUT_S)
        own_server.kill()
        await asyncio.to_thread(own_server.start)

    async with piped(own_server.url) as (_, store):
        await send_through(store, freeze_and_kill)
    assert_each_applied_once(own_server)


@pytest.mark.parametrize(
    ("break_it", "mend_it"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["out of memory", "read-only"],
)
async def test_a_server_that_cannot_write_applies_nothing_in_part(
    server: RedisServer, break_it: tuple[str, ...], mend_it: tuple[str, ...]
) -> None:
    """Neither is a verdict about the owner: the script is sent again until it can be applied."""

    async def harm() -> None:
        with server.client() as client:
            client.execute_command(*break_it)
            try:
                before = dump(client)
                await asyncio.sleep(0.3)
                assert dump(client) == before
            finally:
                client.execute_command(*mend_it)

    async with piped(server.url) as (_, store):
        await send_through(store, harm)
    assert_each_applied_once(server)


class Proxy:
    """A TCP way to a server's socket. `is_silent` swallows everything, on new connections too; no one is told."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)
        self.is_silent = False
        self.num_connections = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; one that begins in silence stays silent."""
        self.num_connections += 1
        self._writers.append(writer)
        is_lost = self.is_silent
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        self._writers.append(up_writer)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal is_lost
            while data := await source.read(65536):
                is_lost = is_lost or self.is_silent
                if not is_lost:
                    sink.write(data)

        self._tasks += [asyncio.ensure_future(pump(reader, up_writer)), asyncio.ensure_future(pump(up_reader, writer))]

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()


async def test_a_network_that_swallows_packets_and_tells_nobody(server: RedisServer) -> None:
    """Connections die without an end; those made meanwhile hang in their first exchange, and are given up too."""
    proxy = Proxy(server.socket)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]

    async def partition() -> None:
        proxy.is_silent = True
        await asyncio.sleep(3.5 * REPLY_TIMEOUT_S)
        proxy.is_silent = False

    async with piped(f"redis://127.0.0.1:{port}") as (_, store):
        await send_through(store, partition)
    assert_each_applied_once(server)
    assert proxy.num_connections > 2
    listener.close()
    await proxy.close()


async def test_who_waits_sees_how_long_and_a_closed_pipe_leaves_no_one_waiting(own_server: RedisServer) -> None:
    async with piped(own_server.url) as (pipe, store):
        own_server.stop()
        reply = store.commit(Changes(), 1)
        await asyncio.sleep(2 * REPLY_TIMEOUT_S)
        assert pipe.oldest_wait_s >= 2 * REPLY_TIMEOUT_S, "sent again, and still the oldest wait"
        assert not pipe.is_up
    assert reply.cancelled()
    own_server.resume()


async def test_a_command_that_redis_refuses_raises_and_the_next_ones_go_on(server: RedisServer) -> None:
    async with piped(server.url) as (pipe, _):
        wrong = pipe.send("HGETALL", worker_key(WORKER, "pool"))
        right = pipe.send("GET", "nothing")
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await wrong
        assert await right is None
