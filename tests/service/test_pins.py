"""Pinned prompts, through real processes: a scan, an expiry, a budget, and the deaths of scheduler and worker."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.client import PagodaClient
from tests.service.calls import Stub, failure
from tests.stack import Stack, collect, running
from tests.timed import timed_request

NUM_BLOCKS = 40
BUDGET = NUM_BLOCKS // 4
FLAGS = ("--timed-step-s", "0.001", "--num-blocks", str(NUM_BLOCKS))
PROMPT_TOKENS = 65
"""Four full blocks."""


@pytest.fixture
async def stack(timed_model: Path) -> AsyncIterator[Stack]:
    """Its own: pins hold blocks."""
    async with running(Stack(timed_model, worker_flags=FLAGS)) as stack:
        yield stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[PagodaClient]:
    async with stack.client() as client:
        yield client


@pytest.fixture
async def stub(stack: Stack) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


async def num_cached(client: PagodaClient, seed: int) -> int:
    """Tokens of this seed's prompt that are hits now."""
    _, _, last = await collect(client, timed_request(seed, 1, PROMPT_TOKENS))
    return last.usage.num_cached_tokens


async def scan(client: PagodaClient, first_seed: int = 1000) -> None:
    """One-off prompts of several pools."""
    for i in range(3 * NUM_BLOCKS // 4):
        await collect(client, timed_request(first_seed + i, 1, PROMPT_TOKENS))


async def pool(client: PagodaClient) -> pb.PoolBlocks:
    return (await client.get_blocks()).pools[0]


async def until_unpinned(client: PagodaClient) -> None:
    for _ in range(500):
        if not (await pool(client)).pins:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("still pinned")


async def test_a_pinned_prompt_outlives_a_scan_and_then_expires(stack: Stack, client: PagodaClient) -> None:
    await collect(client, timed_request(1, 3, PROMPT_TOKENS, pin_prompt_s=4.0, request_id="hot"))
    await collect(client, timed_request(2, 3, PROMPT_TOKENS))
    await scan(client)
    assert await num_cached(client, 2) == 0
    assert await num_cached(client, 1) == 64
    found = await pool(client)
    assert [(pin.request_id, pin.num_blocks) for pin in found.pins] == [("hot", 4)]
    assert found.max_pinned_blocks == BUDGET
    await until_unpinned(client)
    await stack.idle()


async def test_it_may_be_unpinned_before(client: PagodaClient, stub: Stub) -> None:
    await collect(client, timed_request(1, 1, PROMPT_TOKENS, pin_prompt_s=3600.0, request_id="hot"))
    assert await client.unpin("hot") == 4
    await until_unpinned(client)
    code, details = await failure(stub.Unpin(pb.UnpinRequest(request_id="hot")))
    assert (code, details[:10]) == (grpc.StatusCode.NOT_FOUND, "request_id")


async def test_what_is_over_the_budget_is_refused_by_name(client: PagodaClient, stub: Stub) -> None:
    for seed in (1, 2):
        await collect(client, timed_request(seed, 1, PROMPT_TOKENS, pin_prompt_s=3600.0))
    code, details = await failure(stub.Generate(timed_request(3, 1, PROMPT_TOKENS, pin_prompt_s=3600.0)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.startswith("pin_prompt_s: 4 blocks are to be pinned, 2 of the budget of 10 are left")
    await collect(client, timed_request(4, 1, 33, pin_prompt_s=3600.0))
    assert sum(pin.num_blocks for pin in (await pool(client)).pins) == BUDGET


@pytest.mark.parametrize("seconds", [-1.0, 86_401.0, float("nan"), float("inf")])
async def test_a_bad_time_is_refused(stub: Stub, seconds: float) -> None:
    code, details = await failure(stub.Generate(timed_request(1, 1, pin_prompt_s=seconds)))
    assert (code, details[:12]) == (grpc.StatusCode.INVALID_ARGUMENT, "pin_prompt_s")


async def test_choices_and_beams_pin_their_one_prompt(client: PagodaClient) -> None:
    request = timed_request(1, 2, PROMPT_TOKENS, pin_prompt_s=3600.0, request_id="three", n=3)
    async for _ in client.generate(request):
        pass
    assert [(pin.request_id, pin.num_blocks) for pin in (await pool(client)).pins] == [("three", 4)]


async def test_a_pin_is_the_next_schedulers_too(stack: Stack, client: PagodaClient) -> None:
    await collect(client, timed_request(1, 1, PROMPT_TOKENS, pin_prompt_s=3600.0, request_id="hot"))
    before = list((await pool(client)).pins)
    stack.hurt("scheduler")
    await stack.ready()
    assert list((await pool(client)).pins) == before
    await scan(client)
    assert await num_cached(client, 1) == 64
    assert await client.unpin("hot") == 4
    await until_unpinned(client)
    await stack.idle()


async def test_a_pin_ends_with_its_worker(stack: Stack, client: PagodaClient) -> None:
    await collect(client, timed_request(1, 1, PROMPT_TOKENS, pin_prompt_s=3600.0, request_id="hot"))
    stack.hurt("worker")
    await collect(client, timed_request(2, 1, PROMPT_TOKENS))
    assert list((await pool(client)).pins) == []
    with stack.redis() as redis:
        assert not redis.exists("{w:worker-0}:pins")


async def test_the_terminal_lists_and_ends_them(stack: Stack, client: PagodaClient) -> None:
    from deploy.pins import lines_of, to_json

    await collect(client, timed_request(1, 1, PROMPT_TOKENS, pin_prompt_s=100.0, request_id="hot"))
    pools = (await client.get_blocks()).pools
    first, second = lines_of(pools, pools[0].pins[0].expires_at_s - 60.4)
    assert first == "worker-0: 1 pins of 4 blocks; 10 blocks may be pinned"
    assert second == "  hot: 4 blocks, for 60 s more"
    assert json.loads(to_json(pools))["workers"][0]["pins"][0]["request_id"] == "hot"
    assert lines_of([], 0.0) == ["no workers"]
