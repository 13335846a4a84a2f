"""The pipe to a cluster while slots move, nodes die and replicas take over: each slot's scripts once, and in order.

Every test sends numbered scripts of several workers all the while, on slots of every node.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from redis.exceptions import ResponseError

from scheduler.changes import Changes
from scheduler.keys import log_key, request_key, worker_key
from scheduler.redis_cluster import ClusterPipe
from scheduler.request_store import RequestStore
from scheduler.scripts import ALL_SCRIPTS
from scheduler.store import WorkerStore, load_log
from tests.redis_cluster import ClusterUnsupportedError, RedisCluster
from tests.redis_servers import server_binaries

NUM_WORKERS, NUM_SCRIPTS = 6, 150
REPLY_TIMEOUT_S = 0.5
TIMEOUT_S = 40.0
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that gives a silent server up sooner, so that tests take less time."""
    monkeypatch.setattr("scheduler.redis_node.REPLY_TIMEOUT_S", REPLY_TIMEOUT_S)


def new_cluster(kind: str, *flags: str, **settings: object) -> RedisCluster:
    if kind not in server_binaries():
        pytest.skip(f"no {kind} server on this machine")
    cluster = RedisCluster(kind, 3, *flags, **settings)  # type: ignore[arg-type]
    try:
        return cluster.start()
    except ClusterUnsupportedError as error:
        pytest.skip(f"{kind} serves no cluster: {error}")


@pytest.fixture(scope="module", params=["valkey", "redis6", "redis"])
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    cluster = new_cluster(request.param)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """A cluster of each kind of server, empty; its slots may be anywhere."""
    for node in shared_cluster.nodes:
        node.flush()
    return shared_cluster


class Writers:
    """Workers whose stores send one token per script through one pipe; answers are noted in the order they come."""

    def __init__(self, pipe: ClusterPipe) -> None:
        self.pipe = pipe
        self.names = [f"worker-{number}" for number in range(NUM_WORKERS)]
        self.stores = {name: WorkerStore(pipe, name, 600) for name in self.names}
        self._answered: dict[str, list[int]] = {name: [] for name in self.names}

    async def seize(self) -> None:
        await asyncio.gather(*(store.seize(0) for store in self.stores.values()))
        await asyncio.gather(*(store.reclaim("incarnation-1", 8) for store in self.stores.values()))

    async def write_through(self, harm: Callable[[], Awaitable[None]]) -> None:
        """All scripts of all workers, while the harm is done in the middle."""
        replies: list[asyncio.Future[object]] = []
        harming: asyncio.Task[None] | None = None
        for i in range(NUM_SCRIPTS):
            for name, store in self.stores.items():
                reply = store.commit(Changes(append=[(1, i, [i])], **_toggled(i)), i)
                reply.add_done_callback(lambda _, name=name, i=i: self._answered[name].append(i))
                replies.append(reply)
            if i == NUM_SCRIPTS // 3:
                harming = asyncio.ensure_future(harm())
            await asyncio.sleep(0.002)
        async with asyncio.timeout(TIMEOUT_S):
            answers = await asyncio.gather(*replies)
            assert harming is not None
            await harming
        assert set(answers) <= {b"ok", b"done"}

    async def check(self) -> None:
        """Each script was applied once, and answered in order; asked through the pipe, which knows the slots."""
        async with asyncio.timeout(TIMEOUT_S):
            for name in self.names:
                assert await load_log(self.pipe, name, 1, 0) == list(range(NUM_SCRIPTS))
                n, step_id = await asyncio.gather(
                    *(self.pipe.send("HGET", worker_key(name, "meta"), field) for field in ("n", "committed_step_id"))
                )
                assert (n, step_id) == (b"%d" % (NUM_SCRIPTS + 1), b"%d" % (NUM_SCRIPTS - 1))
                assert self._answered[name] == list(range(NUM_SCRIPTS))


def _toggled(i: int) -> dict[str, list[object]]:
    """A block is taken by every second script: applied twice, it would be refused."""
    return {"release": [2]} if i % 2 else {"reserve": [(2, [], [1 + i % 8])]}


@contextlib.asynccontextmanager
async def writing(cluster: RedisCluster, seed: int = 0) -> AsyncIterator[Writers]:
    pipe = ClusterPipe(cluster.nodes[seed].url, ALL_SCRIPTS)
    pipe.start()
    try:
        writers = Writers(pipe)
        async with asyncio.timeout(TIMEOUT_S):
            await writers.seize()
        yield writers
    finally:
        await pipe.close()


async def test_workers_on_every_node_are_served_by_one_pipe(cluster: RedisCluster) -> None:
    async with writing(cluster) as writers:
        assert len({cluster.node_of(worker_key(name, "")) for name in writers.names}) == 3
        await writers.write_through(lambda: asyncio.sleep(0))
        await writers.check()
        assert writers.pipe.is_up
        assert 0 < writers.pipe.round_trip_s < 1
        assert writers.pipe.oldest_wait_s == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.02], ids=["at once", "slowly"])
async def test_a_slot_moves_key_by_key_under_load(cluster: RedisCluster, pause_s: float) -> None:
    """What finds its keys on both nodes waits; nothing is refused, nothing overtakes."""
    slot = cluster.slot_of(worker_key("worker-0", ""))
    source = cluster.owner_of(slot)

    async def move() -> None:
        await asyncio.to_thread(cluster.move, slot, source, (source + 1) % 3, pause_s)

    async with writing(cluster) as writers:
        await writers.write_through(move)
        await writers.check()
    assert cluster.owner_of(slot) == (source + 1) % 3


async def test_a_slot_moves_in_circles_under_load(cluster: RedisCluster) -> None:
    """Back, too, to a node that still has commands of it in flight."""
    slot = cluster.slot_of(worker_key("worker-1", ""))
    source = cluster.owner_of(slot)

    async def move() -> None:
        for turn in range(9):
            at = (source + turn) % 3
            await asyncio.to_thread(cluster.move, slot, at, (at + 1) % 3)
        for turn in range(6):
            there, back = (source, (source + 1) % 3) if turn % 2 == 0 else ((source + 1) % 3, source)
            await asyncio.to_thread(cluster.move, slot, there, back)

    async with writing(cluster) as writers:
        await writers.write_through(move)
        await writers.check()


async def test_a_slot_moves_while_connections_break(cluster: RedisCluster) -> None:
    slots = [cluster.slot_of(worker_key(f"worker-{number}", "")) for number in range(3)]

    def cut() -> None:
        for node in cluster.nodes:
            with node.client() as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def cut_again_and_again() -> None:
        for slot in slots:
            source = cluster.owner_of(slot)
            cut()
            cluster.move(slot, source, (source + 1) % 3, 0.002)
            cut()

    async with writing(cluster) as writers:
        with contextlib.suppress(ConnectionError):
            await writers.write_through(lambda: asyncio.to_thread(cut_again_and_again))
        await writers.check()


async def test_a_slot_that_a_server_moves_as_a_whole(cluster: RedisCluster) -> None:
    """Valkey 9's own way: no key is ever on both nodes."""
    slot = cluster.slot_of(worker_key("worker-2", ""))
    source = cluster.owner_of(slot)
    target = (source + 1) % 3

    def move() -> None:
        with cluster.nodes[source].client() as client:
            client.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", cluster.node_id(target))
        while cluster.owner_of(slot) != target:
            pass

    async with writing(cluster) as writers:
        try:
            await writers.write_through(lambda: asyncio.to_thread(move))
        except ResponseError as error:
            pytest.skip(f"{cluster.kind} can't: {error}")
        await writers.check()
    assert cluster.owner_of(slot) == target


async def test_records_are_made_and_ended_in_a_slot_that_is_on_its_way(cluster: RedisCluster) -> None:
    """Single keys, old ones and new ones, while the slot is between two nodes for all of the test."""
    request_id = "request"
    slot = cluster.slot_of(request_key(request_id))
    source = cluster.owner_of(slot)
    target = (source + 1) % 3
    async with writing(cluster) as writers:
        requests = RequestStore(writers.pipe, 600, 6000)
        with cluster.nodes[source].client() as old, cluster.nodes[target].client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node_id(source))
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node_id(target))
        async with asyncio.timeout(TIMEOUT_S):
            assert (await requests.create(request_id, b"d", b"body", ("worker-0", 1), range(1, 2)))[0]
            assert await requests.own(request_id, ("worker-0", 2), "worker-0", [0])
            await requests.end(request_id, ("worker-0", 2), b"end")
            record = await requests.load(request_id)
        assert record is not None
        assert (record.epoch, record.end) == (2, b"end")
        cluster.move(slot, source, target)
        assert await requests.load(request_id) == record


async def test_nothing_overtakes_what_is_sent_to_the_other_node(cluster: RedisCluster) -> None:
    """New keys are made where the slot goes, old ones are read where it comes from: answers come in one order."""
    slot = cluster.slot_of("{tag}")
    source = cluster.owner_of(slot)
    target = (source + 1) % 3
    done: list[int] = []
    async with writing(cluster) as writers, asyncio.timeout(TIMEOUT_S):
        await writers.pipe.send("SET", "{tag}:old", "here")
        with cluster.nodes[source].client() as old, cluster.nodes[target].client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node_id(source))
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node_id(target))
        replies = []
        for i in range(20):
            words = ("GET", "{tag}:old") if i % 3 else ("SET", f"{{tag}}:new:{i}", "there")
            replies.append(writers.pipe.send(*words))
            replies[-1].add_done_callback(lambda _, i=i: done.append(i))
        answers = await asyncio.gather(*replies)
        assert answers == [b"here" if i % 3 else b"OK" for i in range(20)]
        assert done == list(range(20))
        cluster.move(slot, source, target)


async def test_every_other_key_has_a_home(cluster: RedisCluster) -> None:
    """The registry and the counter are keys of their own."""
    async with writing(cluster, seed=1) as writers, asyncio.timeout(TIMEOUT_S):
        requests = RequestStore(writers.pipe, 600, 6000)
        assert await requests.next_seq_id_prefix() == 1
        assert await requests.next_seq_id_prefix() == 2
        for name in writers.names:
            await requests.register_worker(name)
        assert await requests.worker_names() == writers.names


async def test_what_redis_refuses_raises_and_the_next_ones_go_on(cluster: RedisCluster) -> None:
    async with writing(cluster) as writers:
        wrong = writers.pipe.send("HGETALL", worker_key("worker-0", "pool"))
        right = writers.pipe.send("GET", log_key("worker-0", 99))
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await wrong
        assert await right is None
        stale = WorkerStore(writers.pipe, "worker-0", 600)
        stale.epoch, stale.n = 1, 7
        with pytest.raises(ResponseError, match="GAP"):
            await stale.commit(Changes(), 0)


@pytest.mark.parametrize("seed", [0, 1], ids=["another", "the one that the URL names"])
async def test_a_node_that_dies_and_comes_back(seed: int) -> None:
    """Its workers wait; the others go on."""
    cluster = new_cluster("valkey", *DURABLE)
    try:
        async with writing(cluster, seed) as writers:
            dead = 1
            waiting = [name for name in writers.names if cluster.node_of(worker_key(name, "")) == dead]
            others = [name for name in writers.names if name not in waiting]

            async def kill_and_restart() -> None:
                cluster.nodes[dead].kill()
                await asyncio.sleep(0.3)
                assert not writers.pipe.is_up
                async with asyncio.timeout(1.0):
                    for name in others:
                        await load_log(writers.pipe, name, 1, 0)
                assert writers.pipe.oldest_wait_s > 0.2
                await asyncio.to_thread(cluster.nodes[dead].start)

            await writers.write_through(kill_and_restart)
            await writers.check()
            assert writers.pipe.is_up
    finally:
        cluster.close()


async def test_a_node_that_stands_still(cluster: RedisCluster) -> None:
    """Longer than a reply may take: all is sent again, and counted once."""

    async def freeze() -> None:
        cluster.nodes[2].stop()
        await asyncio.sleep(2.5 * REPLY_TIMEOUT_S)
        cluster.nodes[2].resume()

    async with writing(cluster) as writers:
        await writers.write_through(freeze)
        await writers.check()


async def test_who_waits_sees_how_long_and_a_closed_pipe_leaves_no_one_waiting(cluster: RedisCluster) -> None:
    async with writing(cluster) as writers:
        cluster.nodes[0].stop()
        try:
            writers.pipe.ping()
            await asyncio.sleep(2 * REPLY_TIMEOUT_S)
            assert writers.pipe.oldest_wait_s >= 1.5 * REPLY_TIMEOUT_S, "a ping alone shows it"
            replies = [writers.pipe.send("GET", worker_key(name, "pool")) for name in writers.names]
            await asyncio.sleep(0.1)
            await writers.pipe.close()
            assert all(reply.done() for reply in replies)
        finally:
            cluster.nodes[0].resume()


@pytest.mark.slow  # through the whole service: tests/chaos/test_redis_cluster.py
@pytest.mark.parametrize("kind", ["valkey", "redis6", "redis"])
async def test_a_replica_takes_over_when_it_is_told_to(kind: str) -> None:
    """Nothing is lost, so nothing is refused."""
    cluster = new_cluster(kind, has_replicas=True)
    try:
        async with writing(cluster) as writers:

            async def fail_over() -> None:
                for number in (3, 4):
                    with cluster.nodes[number].client() as client:
                        client.execute_command("CLUSTER", "FAILOVER")
                    await asyncio.to_thread(cluster.await_master, number)

            await writers.write_through(fail_over)
            await writers.check()
        assert cluster.owner_of(cluster.slot_of(worker_key("worker-0", "")), 5) in (2, 3, 4)
    finally:
        cluster.close()


@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis6", marks=pytest.mark.slow), "redis"])
async def test_a_master_dies_and_its_replica_takes_over(kind: str) -> None:
    """It had all that was answered; what was not is sent again, to the replica."""
    cluster = new_cluster(kind, has_replicas=True, node_timeout_ms=1000)
    try:
        async with writing(cluster) as writers:

            async def kill() -> None:
                time.sleep(0.05)  # noqa: ASYNC251  nothing more is sent: what was sent is executed, and passed on
                with cluster.nodes[0].client() as client:
                    assert client.execute_command("WAIT", 1, 1000) == 1
                cluster.nodes[0].kill()
                await asyncio.to_thread(cluster.await_master, 3)

            await writers.write_through(kill)
            await writers.check()
            assert writers.pipe.is_up, "the dead one is no part of it any more"
    finally:
        cluster.close()


async def test_a_replica_that_takes_over_behind_refuses_what_comes_next() -> None:
    """It misses scripts that were answered: nobody goes on as if it had them."""
    cluster = new_cluster("valkey", has_replicas=True, node_timeout_ms=1000)
    try:
        async with writing(cluster) as writers, asyncio.timeout(TIMEOUT_S):
            name = next(name for name in writers.names if cluster.node_of(worker_key(name, "")) == 0)
            store = writers.stores[name]
            with cluster.nodes[0].client() as client:
                client.execute_command("WAIT", 1, 1000)
            cluster.nodes[3].stop()
            with cluster.nodes[0].client() as client:
                client.execute_command("CLIENT", "KILL", "TYPE", "replica")
            assert await store.commit(Changes(append=[(1, 0, [5])]), 1) == b"ok"
            cluster.nodes[0].kill()
            cluster.nodes[3].resume()
            with pytest.raises(ResponseError, match="GAP"):
                await store.commit(Changes(append=[(1, 1, [6])]), 2)
    finally:
        cluster.close()
