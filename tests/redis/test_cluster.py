"""Three nodes of a Redis Cluster: every script stays within one tag, so that workers spread over the nodes.

A script that touched keys of two slots would be refused by a node, and never be answered by a pipe, which takes that
for an outage.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.exceptions import ResponseError

from scheduler.changes import Changes
from scheduler.config import ConfigError
from scheduler.keys import request_key, worker_key, worker_keys
from scheduler.redis_check import check_redis
from scheduler.redis_pipe import RedisPipe
from scheduler.request_store import RequestStore
from scheduler.scripts import ALL_SCRIPTS, STEP
from scheduler.store import STEP_KEYS, SequenceRow, WorkerStore
from tests.load.lockstep_fleet import Fleet
from tests.redis_cluster import ClusterUnsupportedError, RedisCluster
from tests.redis_servers import server_binaries

TIMEOUT_S = 60.0
ROW = SequenceRow("request", 0, 0, 0, 0, -1).pack()


@pytest.fixture(scope="module", params=["valkey", "redis6", "redis"])
def started_cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    if request.param not in server_binaries():
        pytest.skip(f"no {request.param} server on this machine")
    cluster = RedisCluster(request.param)
    try:
        cluster.start()
    except ClusterUnsupportedError as error:
        pytest.skip(f"{request.param} serves no cluster: {error}")
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(started_cluster: RedisCluster) -> RedisCluster:
    """A cluster of each kind of server, empty."""
    for node in started_cluster.nodes:
        node.flush()
    return started_cluster


@pytest.fixture
async def pipes(cluster: RedisCluster) -> AsyncIterator[list[RedisPipe]]:
    """One to each node."""
    pipes = [RedisPipe(node.url, ALL_SCRIPTS) for node in cluster.nodes]
    for pipe in pipes:
        pipe.start()
    yield pipes
    for pipe in pipes:
        await pipe.close()


async def test_workers_of_full_pools_spread_over_the_nodes(cluster: RedisCluster) -> None:
    """Each lies on one node whole, and is there what the mirror says, after decode steps that evict blocks."""
    async with asyncio.timeout(TIMEOUT_S), Fleet(cluster.nodes, 10_000, cluster.node_of) as fleet:
        await fleet.fill(4)
        await fleet.check()
        filled = fleet.pool.image()
        await fleet.run(num_rows=256, num_rounds=20, num_in_flight=8)
        await fleet.check()
        assert fleet.pool.image() != filled
        assert all(fleet.check_nodes()), "a node without a worker"


async def test_every_other_script_stays_within_its_tag(cluster: RedisCluster, pipes: list[RedisPipe]) -> None:
    """Forks, copies, moves, a new incarnation, and the records of requests."""
    for number in range(6):
        worker, request_id = f"worker-{number}", f"request-{number}"
        store = WorkerStore(pipes[cluster.node_of(worker_key(worker, ""))], worker, 600)
        requests = RequestStore(pipes[cluster.node_of(request_key(request_id))], 600, 6000)
        async with asyncio.timeout(TIMEOUT_S):
            await store.seize(0)
            await store.reclaim("incarnation-1", 8)
            await requests.create(request_id, b"digest", b"body", (worker, store.epoch), range(1, 2))
            await store.commit(Changes(describe=[(1, ROW)], reserve=[(1, [], [1, 2])]), 0)
            await store.commit(Changes(append=[(1, 0, [5])], computed=[(1, 20)], fork=[(1, 2, 1, 2, 3, 4)]), 1)
            image = await store.load()
            assert image.tables == {1: [1, 2], 2: [1, 3]}
            assert image.pool.copies == {3: (2, 4)}
            await store.commit(Changes(copied=[3], release=[1, 2], close=[1], forget=[2]), 2)
            assert (await store.load()).pool.ref_counts == {}
            await store.reclaim("incarnation-2", 8)
            await requests.own(request_id, ("worker-9", 1), worker, [1])
            await requests.end(request_id, ("worker-9", 1), b"end")


async def test_a_scheduler_knows_a_cluster_when_it_sees_one(cluster: RedisCluster) -> None:
    assert await check_redis(cluster.nodes[1].url)
    assert await check_redis(f"redis://127.0.0.1:{cluster.ports[2]}")


async def test_a_scheduler_refuses_a_cluster_that_loses_things(cluster: RedisCluster) -> None:
    """Whichever of its nodes does."""
    node = f"node 127.0.0.1:{cluster.ports[2]} of the cluster: "
    with cluster.nodes[2].client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match=f"{node}its maxmemory-policy is allkeys-lru"):
                await check_redis(cluster.nodes[0].url)
        finally:
            client.config_set("maxmemory-policy", "noeviction")


async def test_a_scheduler_refuses_a_cluster_with_slots_that_nobody_owns(cluster: RedisCluster) -> None:
    with cluster.nodes[0].client() as client:
        client.execute_command("CLUSTER", "DELSLOTS", 1, 2)
        try:
            with pytest.raises(ConfigError, match="nobody owns 2 of the cluster's slots"):
                await check_redis(cluster.nodes[0].url)
        finally:
            client.execute_command("CLUSTER", "ADDSLOTS", 1, 2)


def test_a_node_refuses_a_script_of_two_tags(cluster: RedisCluster) -> None:
    """So that the other tests can fail."""
    keys = [*worker_keys("worker-0", STEP_KEYS[:1]), *worker_keys("worker-1", STEP_KEYS[1:])]
    with cluster.nodes[cluster.node_of(keys[0])].client() as client:
        with pytest.raises(ResponseError, match="same slot"):
            client.eval(STEP.text, len(keys), *keys, 1, 1, 0, 600, *[""] * 10)
        foreign = worker_key("worker-1", "meta")
        with pytest.raises(ResponseError, match="non local key"):
            client.eval(f"return redis.call('GET', '{foreign}')", 1, keys[0])
