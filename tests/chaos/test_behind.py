"""A Redis that comes back without the last of what it had acknowledged: it is generated again, and it is the same.

The worker says what it has heard to be in Redis; a Redis that is behind that voids the worker's pool. What clients have
already they do not get again: their streams are refused until the logs have grown past them.
"""

import asyncio
import shutil
from pathlib import Path

import grpc
import pytest
from pagoda.v1 import generation_pb2 as pb

from tests.chaos.test_kills import Load, timed_stack
from tests.chaos.test_redis_cluster import clustered, node_of_worker
from tests.service.calls import Stub, failure
from tests.stack import Stack, collect, running
from tests.timed import make_timed_model, timed_request, timed_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_timed_model(tmp_path_factory.mktemp("timed"))


def restore(stack: Stack, saved: Path) -> None:
    """The append-only log as it once was."""
    log = stack.directory / "appendonlydir"
    shutil.rmtree(log)
    shutil.copytree(saved, log)


async def test_a_redis_that_comes_back_with_an_older_log(model: Path, tmp_path: Path) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 500)
        await load.share(0.2)
        shutil.copytree(stack.directory / "appendonlydir", tmp_path / "saved")
        await load.share(0.5)
        stack.kill("redis")
        restore(stack, tmp_path / "saved")
        stack.start_redis()
        await load.check()
        await stack.idle()
        assert "Redis has lost steps" in stack.log("scheduler")
        assert "Traceback" not in stack.log("scheduler")


async def test_a_replica_that_takes_over_behind_its_master(model: Path) -> None:
    async with clustered(model, has_replicas=True, node_timeout_ms=1000) as (stack, cluster), stack.client() as client:
        load = Load(client, 12, 500)
        await load.share(0.2)
        master = node_of_worker(cluster, 0)
        cluster.nodes[3 + master].stop()
        with cluster.nodes[master].client() as redis:
            redis.execute_command("CLIENT", "KILL", "TYPE", "replica")
        await load.share(0.5)
        cluster.nodes[master].kill()
        cluster.nodes[3 + master].resume()
        await load.check()
        await stack.idle()
        assert "GAP" in stack.log("scheduler")
        assert "Traceback" not in stack.log("scheduler")


async def test_a_token_that_is_not_there_yet_is_no_mistake_of_the_client(model: Path) -> None:
    """Where the request lives: past its end it is one."""
    async with running(timed_stack(model)) as stack, stack.client() as client:
        reading = asyncio.create_task(collect(client, timed_request(1, 300, request_id="ahead", resumable=True)))
        await stack.until(lambda status: status.workers[0].num_running == 1)
        async with grpc.aio.insecure_channel(stack.address) as channel:
            ahead = pb.AttachRequest(request_id="ahead", next_index=[299])
            assert (await failure(Stub(channel).Attach(ahead)))[0] is grpc.StatusCode.UNAVAILABLE
            assert [d.token_ids[0] async for d in client.attach("ahead", [299])] == timed_tokens(1, 300)[299:]
            await reading
            past = pb.AttachRequest(request_id="ahead", next_index=[301])
            assert (await failure(Stub(channel).Attach(past)))[0] is grpc.StatusCode.INVALID_ARGUMENT
