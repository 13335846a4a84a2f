"""The whole service on a Redis Cluster: slots move, nodes die, replicas take over, and every stream ends whole.

Timed workers, as in test_kills. The two workers' keys lie on two nodes, the requests' records on all three.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.keys import request_key, worker_key
from tests.chaos.test_kills import Load, timed_stack
from tests.redis_cluster import RedisCluster
from tests.stack import Stack, collect, running
from tests.timed import make_timed_model, timed_request, timed_tokens

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
NUM_REQUESTS, NUM_TOKENS = 12, 250


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_timed_model(tmp_path_factory.mktemp("timed"))


@contextlib.asynccontextmanager
async def clustered(model: Path, *flags: str, **settings: object) -> AsyncIterator[tuple[Stack, RedisCluster]]:
    """A scheduler and two workers beside the nodes."""
    cluster = RedisCluster("valkey", 3, *flags, **settings)  # type: ignore[arg-type]
    await asyncio.to_thread(cluster.start)
    try:
        stack = timed_stack(model, 2)
        stack.redis_url = f"redis://127.0.0.1:{cluster.ports[0]}"
        async with running(stack):
            yield stack, cluster
    finally:
        cluster.close()


def node_of_worker(cluster: RedisCluster, number: int) -> int:
    return cluster.node_of(worker_key(f"worker-{number}", ""))


async def all_is_well(stack: Stack, load: Load) -> None:
    """Every stream ended whole, and nobody lost a worker on the way."""
    await load.check()
    status = await stack.idle()
    assert [w.epoch for w in status.workers] == [1, 1], "ownership was lost"
    assert "Traceback" not in stack.log("scheduler")


async def test_a_cluster_serves_and_keeps_nothing_but_pools(model: Path) -> None:
    async with clustered(model) as (stack, cluster), stack.client() as client:
        assert node_of_worker(cluster, 0) != node_of_worker(cluster, 1)
        assert len({cluster.node_of(request_key(f"r{i}")) for i in range(1, NUM_REQUESTS + 1)}) == 3
        await all_is_well(stack, Load(client, NUM_REQUESTS, 50))
        kept = set()
        for node in cluster.nodes:
            with node.client() as redis:
                keys = [bytes(key).decode() for key in redis.scan_iter()]
                kept |= {key for key in keys if redis.ttl(key) == -1}
        pools = {f"{{w:worker-{i}}}:{part}" for i in range(2) for part in ("meta", "pool", "index")}
        assert kept == {"pagoda:workers", "pagoda:seq_id_prefix", *pools}


async def test_slots_of_a_worker_and_of_requests_move_under_load(model: Path) -> None:
    async with clustered(model) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, 5 * NUM_TOKENS)
        keys = [worker_key("worker-0", ""), *(request_key(f"r{i}") for i in range(1, 5)), worker_key("worker-1", "")]
        for turn, key in enumerate(keys):
            await load.share(0.03 * (turn + 1))
            source = cluster.node_of(key)
            await asyncio.to_thread(cluster.move, cluster.slot_of(key), source, (source + 1) % 3, 0.002)
        assert load.num_missing > 0
        await all_is_well(stack, load)
        assert (await collect(client, timed_request(99, 5)))[0] == timed_tokens(99, 5)


@pytest.mark.parametrize("name", ["scheduler", pytest.param("worker-0", marks=pytest.mark.slow)])
async def test_a_process_dies_while_its_slot_is_between_two_nodes(model: Path, name: str) -> None:
    async with clustered(model) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, NUM_TOKENS)
        await load.share(0.2)
        slot, source = cluster.slot_of(worker_key("worker-0", "")), node_of_worker(cluster, 0)
        moving = asyncio.create_task(asyncio.to_thread(cluster.move, slot, source, (source + 1) % 3, 0.02))
        await asyncio.sleep(0.1)
        assert not moving.done()
        stack.kill(name)
        if name == "scheduler":
            stack.start_scheduler()
        else:
            stack.start_worker(0)
        await moving
        await load.check()
        await stack.idle()


@pytest.mark.parametrize("dead", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_node_is_killed_and_comes_back(model: Path, dead: int) -> None:
    """The one that the URL names, one with a worker, one with records alone."""
    async with clustered(model, *DURABLE) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, NUM_TOKENS)
        await load.share(0.3)
        cluster.nodes[dead].kill()
        await asyncio.sleep(0.5)
        assert not await client.is_serving()
        await asyncio.to_thread(cluster.nodes[dead].start)
        await all_is_well(stack, load)
        assert await client.is_serving()


async def test_a_scheduler_that_starts_while_a_node_is_away(model: Path) -> None:
    """It serves what it reaches, and the rest as soon as that is back."""
    async with clustered(model, *DURABLE) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, NUM_TOKENS)
        await load.share(0.3)
        dead = next(number for number in (1, 2) if cluster.node_of("pagoda:seq_id_prefix") != number)
        cluster.nodes[dead].kill()
        stack.kill("scheduler")
        stack.start_scheduler()
        await asyncio.sleep(1.0)
        await asyncio.to_thread(cluster.nodes[dead].start)
        await load.check()
        await stack.idle()
        assert "out of reach" in stack.log("scheduler")


async def test_replicas_take_over_when_they_are_told_to(model: Path) -> None:
    async with clustered(model, has_replicas=True) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, NUM_TOKENS)
        for master in range(3):
            await load.share(0.2 + 0.2 * master)
            with cluster.nodes[3 + master].client() as redis:
                redis.execute_command("CLUSTER", "FAILOVER")
            await asyncio.to_thread(cluster.await_master, 3 + master)
        await all_is_well(stack, load)


async def test_a_replica_takes_over_from_a_dead_master(model: Path) -> None:
    """It had all that its master had answered: ownership stays, and nothing is computed again."""
    async with clustered(model, has_replicas=True, node_timeout_ms=1000) as (stack, cluster), stack.client() as client:
        load = Load(client, NUM_REQUESTS, NUM_TOKENS)
        await load.share(0.3)
        master = node_of_worker(cluster, 0)
        with stack.stopped("scheduler"):  # nothing more is sent: what was sent is executed, and passed on
            with cluster.nodes[master].client() as redis:
                assert redis.execute_command("WAIT", 1, 1000) == 1
            cluster.nodes[master].kill()
        began_s = time.monotonic()
        await asyncio.to_thread(cluster.await_master, 3 + master)
        await all_is_well(stack, load)
        print(f"whole {time.monotonic() - began_s:.1f} s after the death, with a node timeout of 1 s")
        status = await stack.status()
        assert all(w.state == pb.WORKER_STATE_LIVE for w in status.workers)
