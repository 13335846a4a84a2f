"""What becomes of blocks, told by GetBlocks and Explain: through real processes and a restart of the scheduler."""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.service.calls import Stub, begun, failure
from tests.stack import Stack, collect, running, started
from tests.timed import timed_request

NUM_BLOCKS = 40
FLAGS = ("--timed-step-s", "0.002", "--num-blocks", str(NUM_BLOCKS))
HIT, COMPUTED, EVICTED, LAST = 1, 2, 3, 4


@pytest.fixture(scope="module")
def own_stack(timed_model: Path) -> Iterator[Stack]:
    with started(Stack(timed_model, worker_flags=FLAGS)) as stack:
        yield stack


@pytest.fixture
async def stack(own_stack: Stack) -> AsyncIterator[Stack]:
    yield own_stack
    await own_stack.idle()


def columns(pool: pb.PoolBlocks) -> list[tuple[int, int]]:
    """(state, ref_count) by block."""
    return list(zip(pool.states, struct.unpack(f"<{len(pool.states)}I", pool.ref_counts), strict=True))


async def test_every_block_is_told_as_status_counts_it(stack: Stack, client: PagodaClient, stub: Stub) -> None:
    await collect(client, timed_request(1, 1, 64))
    streams = [stub.Generate(timed_request(1, 150, 65)) for _ in range(3)]
    for stream in streams:
        await begun(stream)
    with stack.stopped("worker-0"):
        await asyncio.sleep(0.1)
        (pool,) = (await client.get_blocks()).pools
        status = (await client.get_status()).workers[0]
        for stream in streams:
            stream.cancel()
    assert (pool.worker, pool.state, pool.block_size) == ("worker-0", pb.WORKER_STATE_LIVE, 16)
    blocks = columns(pool)
    assert len(blocks) == NUM_BLOCKS
    assert pool.states.count(pb.BLOCK_STATE_FREE) == status.num_free_blocks
    assert pool.states.count(pb.BLOCK_STATE_REFERENCED) == status.num_referenced_blocks
    assert all((ref_count > 0) == (state == pb.BLOCK_STATE_REFERENCED) for state, ref_count in blocks)
    prefix_blocks = [i for i, (_, ref_count) in enumerate(blocks) if ref_count == 3]
    assert len(prefix_blocks) == 4
    await stack.idle()
    (pool,) = (await client.get_blocks("worker-0")).pools
    assert {pool.states[i] for i in prefix_blocks} == {pb.BLOCK_STATE_PROTECTED}
    assert sum(ref_count for _, ref_count in columns(pool)) == 0


async def test_a_worker_that_is_not_there_has_no_blocks(stub: Stub) -> None:
    code, details = await failure(stub.GetBlocks(pb.GetBlocksRequest(worker="worker-9")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "'worker-9'" in details


async def test_a_prompt_is_explained_from_its_first_request_to_its_eviction(stack: Stack, client: PagodaClient) -> None:
    async def explained(request_id: str, seed: int, prompt_tokens: int) -> pb.Admission:
        await collect(client, timed_request(seed, 2, prompt_tokens, request_id=request_id))
        explanation = await client.explain(request_id)
        assert (explanation.request_id, explanation.num_prompt_tokens) == (request_id, prompt_tokens)
        assert explanation.block_size == 16
        assert explanation.has_ended
        (admission,) = explanation.admissions
        assert (admission.worker, admission.attempt) == ("worker-0", 0)
        return admission

    first = await explained("first", 10, 100)
    assert first.sources == bytes([COMPUTED] * 6 + [LAST])
    assert (await explained("second", 10, 100)).sources == bytes([HIT] * 6 + [LAST])
    one_off = await explained("one-off", 11, 300)
    assert one_off.sources == bytes([COMPUTED] * 18 + [LAST])
    thief = await explained("thief", 12, 600)
    before = (await client.get_blocks()).pools[0].num_evictions
    assert before >= 18
    again = await explained("one-off-again", 11, 300)
    assert again.sources == bytes([EVICTED] * 18 + [LAST])
    (run,) = again.evicted_runs
    assert (run.first_block, run.num_blocks, run.evicted_for) == (0, 18, "thief")
    assert first.admitted_at_s < run.evicted_at_s < again.admitted_at_s
    assert abs(run.evicted_at_s - thief.admitted_at_s) < 0.1


async def test_who_waits_has_not_been_admitted(stack: Stack, client: PagodaClient, stub: Stub) -> None:
    first = stub.Generate(timed_request(20, 300, 300))
    await begun(first)
    waiting = stub.Generate(timed_request(21, 300, 300, request_id="waits"))
    await anext(aiter(waiting))
    explanation = await client.explain("waits")
    assert not explanation.admissions
    assert not explanation.has_ended
    first.cancel()
    await begun(waiting)
    assert len((await client.explain("waits")).admissions) == 1
    waiting.cancel()


async def test_a_request_that_is_unknown_or_expired_is_not_found(timed_model: Path) -> None:
    async with running(Stack(timed_model, 1, ("--record-ttl-s", "1"), FLAGS)) as stack, stack.client() as client:
        await collect(client, timed_request(30, 2, request_id="short"))
        assert (await client.explain("short")).admissions
        await asyncio.sleep(1.2)
        for name in ("short", "never"):
            code, details = await failure(client.explain(name))
            assert code is grpc.StatusCode.NOT_FOUND
            assert details == f"request_id: no request {name!r}; it never was, or it has expired"


async def test_a_new_scheduler_says_that_only_the_one_before_it_knew(timed_model: Path) -> None:
    """Of what ended before, and of what runs on; what it admits itself it can tell."""
    async with running(Stack(timed_model, worker_flags=FLAGS)) as stack, stack.client() as client:
        await collect(client, timed_request(40, 2, 100, request_id="ended"))
        long = asyncio.create_task(collect(client, timed_request(41, 500, 40, request_id="runs", resumable=True)))
        await stack.until(lambda status: status.workers[0].num_running > 0)
        stack.kill("scheduler")
        stack.start_scheduler()
        await stack.ready()
        for name in ("ended", "runs"):
            code, details = await failure(client.explain(name))
            assert code is grpc.StatusCode.NOT_FOUND
            assert details.endswith("is not known here: it was admitted by an earlier scheduler"), details
        await collect(client, timed_request(40, 2, 100, request_id="mine"))
        assert (await client.explain("mine")).admissions[0].sources == bytes([HIT] * 6 + [LAST])
        await long
        code, details = await failure(client.explain("runs"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "earlier scheduler" in details


async def test_a_preempted_request_tells_both_of_its_admissions(timed_model: Path) -> None:
    flags = ("--timed-step-s", "0.002", "--num-blocks", "12")
    async with running(Stack(timed_model, 1, ("--overcommit", "9"), flags)) as stack, stack.client() as client:
        requests = [timed_request(50 + i, 90, 60, request_id=f"r{i}") for i in range(2)]
        await asyncio.gather(*(collect(client, request) for request in requests))
        assert (await stack.status()).workers[0].num_preemptions
        told = [await client.explain(request.request_id) for request in requests]
        first, *_, last = max((explanation.admissions for explanation in told), key=len)
        assert (first.attempt, first.sources) == (0, bytes([COMPUTED] * 3 + [LAST]))
        assert last.attempt > 0
        assert last.admitted_at_s > first.admitted_at_s


async def test_a_request_that_lost_its_worker_tells_where_it_went(timed_model: Path) -> None:
    async with running(Stack(timed_model, 2, worker_flags=FLAGS)) as stack, stack.client() as client:
        long = asyncio.create_task(collect(client, timed_request(60, 600, 40, request_id="moves", resumable=True)))
        status = await stack.until(lambda status: any(worker.num_running for worker in status.workers))
        name = next(worker.name for worker in status.workers if worker.num_running)
        stack.kill(name)
        await long
        first, second = (await client.explain("moves")).admissions
        assert (first.worker, first.attempt, second.attempt) == (name, 0, 1)
        assert {first.worker, second.worker} == {"worker-0", "worker-1"}
        lost = next(pool for pool in (await client.get_blocks()).pools if pool.worker == name)
        assert (lost.state, lost.states) == (pb.WORKER_STATE_LOST, b"")
