"""Plans of several steps, through real processes: they are longer where all streams gather tokens."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.client import PagodaClient
from tests.stack import Stack, collect, running
from tests.timed import timed_request, timed_tokens

NUM_TOKENS = 60


@pytest.fixture
async def stack(timed_model: Path) -> AsyncIterator[Stack]:
    """Steps of 10 ms: one goes into a plan where somebody waits for tokens, three where all gather them."""
    flags = ("--timed-step-s", "0.01", "--num-blocks", "2000")
    async with running(Stack(timed_model, worker_flags=flags, scheduler_flags=("--plan-ms", "6"))) as stack:
        yield stack


async def num_commits(client: PagodaClient) -> int:
    """Scripts that the only worker's engine has sent: one for each plan, and some for each request."""
    return (await client.get_status()).workers[0].num_commits


async def test_all_streams_decide_how_long_plans_are(stack: Stack) -> None:
    async with stack.client() as client:

        async def run(seed: int, stream_interval: int) -> None:
            request = timed_request(seed, NUM_TOKENS, stream_interval=stream_interval)
            token_ids, _, _ = await collect(client, request)
            assert token_ids == timed_tokens(seed, NUM_TOKENS)

        async def commits_of(first_seed: int, *stream_intervals: int) -> int:
            before = await num_commits(client)
            await asyncio.gather(*(run(first_seed + i, n) for i, n in enumerate(stream_intervals)))
            await stack.idle()
            return await num_commits(client) - before

        await run(1, 0)  # its steps are measured
        assert await commits_of(10, 0) >= NUM_TOKENS
        assert await commits_of(20, 16) <= NUM_TOKENS * 2 / 3
        assert await commits_of(30, 16, 16, 16) <= NUM_TOKENS * 2 / 3
        assert await commits_of(40, 16, 16, 1) >= NUM_TOKENS
        assert await commits_of(50, 3, 3) <= NUM_TOKENS * 2 / 3, "as many steps as they gather tokens"
