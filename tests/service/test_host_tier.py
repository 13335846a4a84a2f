"""The host tier of the prefix cache, through real processes: what it hits, and how it is told."""

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from deploy.blocks import to_json
from deploy.explain import lines_of
from deploy.pool_map import MapSize, draw_pool
from scheduler.client import PagodaClient
from tests.chaos.reference import reference_of
from tests.checkpoints import make_checkpoint
from tests.stack import Stack, collect, greedy, running

NUM_BLOCKS, NUM_HOST_BLOCKS = 20, 60
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 12
# Step by step, so that what is on its way to the host is there before it would be evicted.
SCHEDULER_FLAGS = ("--preemption", "swap", "--plan-ms", "0")
FLAGS = ("--num-blocks", str(NUM_BLOCKS), "--num-host-blocks", str(NUM_HOST_BLOCKS), "--poison-freed-blocks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
async def stack(model: Path) -> AsyncIterator[Stack]:
    async with running(Stack(model, scheduler_flags=SCHEDULER_FLAGS, worker_flags=FLAGS)) as stack:
        yield stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[PagodaClient]:
    async with stack.client() as client:
        yield client


def prompts() -> list[list[int]]:
    """Four, of seven blocks each: the pool holds two of them."""
    rng = random.Random(4)
    return [[rng.randrange(3, 300) for _ in range(PROMPT_TOKENS)] for _ in range(4)]


async def serve(model: Path, client: PagodaClient, salt: str = "") -> list[pb.Delta]:
    """All of them, one after the other; the last delta of each."""
    lasts = []
    for i, prompt in enumerate(prompts()):
        request = greedy(prompt, OUTPUT_TOKENS, cache_salt=salt, request_id=f"r{i}-{len(lasts)}{random.random()}")
        ours, _, last = await collect(client, request)
        reference_of(model).check(prompt, ours, OUTPUT_TOKENS)
        lasts.append(last)
    return lasts


async def test_prompts_that_the_pool_cannot_hold_are_hit_on_the_host(
    model: Path, stack: Stack, client: PagodaClient
) -> None:
    await serve(model, client)
    await stack.idle()
    again = await serve(model, client)
    assert [last.usage.num_cached_tokens for last in again] == [96] * 4
    (worker,) = (await stack.idle()).workers
    assert worker.num_host_hit_tokens >= 2 * 96
    assert worker.num_blocks_swapped_in == worker.num_host_hit_tokens // 16
    assert worker.num_cached_host_blocks + worker.num_free_host_blocks == worker.num_host_blocks == NUM_HOST_BLOCKS


async def test_another_salt_hits_nothing_there(model: Path, stack: Stack, client: PagodaClient) -> None:
    await serve(model, client)
    assert [last.usage.num_cached_tokens for last in await serve(model, client, "another")] == [0] * 4


async def test_it_is_the_next_schedulers_too(model: Path, stack: Stack, client: PagodaClient) -> None:
    await serve(model, client)
    await stack.idle()
    stack.hurt("scheduler")
    await stack.ready()
    assert [last.usage.num_cached_tokens for last in await serve(model, client)] == [96] * 4


async def test_it_is_gone_with_its_worker(model: Path, stack: Stack, client: PagodaClient) -> None:
    await serve(model, client)
    await stack.idle()
    stack.hurt("worker")
    assert [last.usage.num_cached_tokens for last in await serve(model, client)] == [0] * 4


async def test_a_request_says_what_it_had_from_the_host(model: Path, stack: Stack, client: PagodaClient) -> None:
    await serve(model, client)
    await stack.idle()
    await collect(client, greedy(prompts()[0], 2, request_id="again"))
    explanation = await client.explain("again")
    sources = list(explanation.admissions[0].sources)
    num_left = sources.count(pb.BLOCK_SOURCE_HIT)  # of a chain the head is evicted last
    assert num_left < 6
    from_host = [pb.BLOCK_SOURCE_HOST_HIT] * (6 - num_left)
    assert sources == [pb.BLOCK_SOURCE_HIT] * num_left + from_host + [pb.BLOCK_SOURCE_LAST]
    lines = list(lines_of(explanation))
    assert lines[1].endswith("on worker-0: 6 of 7 blocks hit")
    assert lines[-2].endswith("hit on the host")


async def test_the_map_shows_both_pools(model: Path, stack: Stack, client: PagodaClient) -> None:
    await serve(model, client)
    await stack.idle()
    pools = await client.get_blocks()
    (pool,) = pools.pools
    assert len(pool.states) == NUM_BLOCKS
    assert len(pool.host_states) == NUM_HOST_BLOCKS
    num_cached = pool.host_states.count(pb.BLOCK_STATE_CACHED)
    drawn = draw_pool(pool, MapSize(80, 16)).plain.splitlines()
    assert drawn[2].startswith(
        f"worker-0  on the host, 60 blocks: {60 - num_cached} free, 0 moving, {num_cached} cached"
    )
    assert drawn[3].strip() == "1 " + "-" * num_cached + "·" * (60 - num_cached)
    (told,) = json.loads(to_json(pools))["pools"]
    assert told["host_states"] == "c" * num_cached + "f" * (60 - num_cached)
