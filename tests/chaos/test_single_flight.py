"""A prefix that many want at once is run once in the whole fleet, whoever goes away meanwhile.

Timed workers, whose counters say how many tokens they ran. A step of 64 tokens takes 10 ms, a prefix half a second: it
can be joined, cancelled and killed in the middle.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.stack import Stack, collect, running
from tests.timed import make_timed_model, timed_tokens

BATCH_TOKENS, STEP_S = 64, 0.01
PREFIX = [1 + i % 250 for i in range(48 * BATCH_TOKENS)]
NUM_OWN, NUM_OUTPUT, NUM_REQUESTS = 20, 5, 12
PREFIX_S = len(PREFIX) / BATCH_TOKENS * STEP_S


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_timed_model(tmp_path_factory.mktemp("timed"))


def fleet(model: Path, num_workers: int = 2) -> Stack:
    flags = ("--timed-step-s", str(STEP_S), "--num-blocks", "4000", "--max-num-batched-tokens", str(BATCH_TOKENS))
    return Stack(model, num_workers, ("--lease-s", "1"), flags)


def request(number: int, **fields: object) -> pb.GenerateRequest:
    """The prefix, and some tokens of its own."""
    ids = [*PREFIX, *[251 + number] * NUM_OWN]
    sampling = pb.SamplingParams(temperature=1, seed=number, max_tokens=NUM_OUTPUT, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, **fields)  # type: ignore[arg-type]


def num_own_tokens(num_requests: int) -> int:
    """What requests run beside the prefix: their own tokens, and all output but the last."""
    return num_requests * (NUM_OWN + NUM_OUTPUT - 1)


async def all_of(client: PagodaClient, numbers: Sequence[int], **fields: object) -> None:
    """Runs requests side by side, and looks that each gets its tokens."""
    results = await asyncio.gather(*(collect(client, request(i, **fields)) for i in numbers))
    for number, (token_ids, _, _) in zip(numbers, results, strict=True):
        assert token_ids == timed_tokens(number, NUM_OUTPUT)


def num_run(status: pb.GetStatusResponse) -> dict[str, int]:
    """Tokens that each worker ran."""
    return {worker.name: worker.num_step_tokens for worker in status.workers}


async def leads(stack: Stack) -> str:
    """The worker that computes the prefix, once it has begun to."""

    def has_begun(status: pb.GetStatusResponse) -> bool:
        return any(tokens > 5 * BATCH_TOKENS for tokens in num_run(status).values())

    counts = num_run(await stack.until(has_begun))
    assert all(tokens < len(PREFIX) for tokens in counts.values()), "it is done already"
    return max(counts, key=counts.__getitem__)


@pytest.mark.parametrize("num_workers", [2, 3])
async def test_requests_at_once_run_it_once_in_the_whole_fleet(model: Path, num_workers: int) -> None:
    async with running(fleet(model, num_workers)) as stack, stack.client() as client:
        await all_of(client, range(NUM_REQUESTS))
        counts = num_run(await stack.idle())
        assert sum(counts.values()) == len(PREFIX) + num_own_tokens(NUM_REQUESTS)


async def test_requests_that_come_while_it_runs_follow_it(model: Path) -> None:
    """To the worker where it runs, though the other one is idle."""
    async with running(fleet(model)) as stack, stack.client() as client:
        first = asyncio.create_task(all_of(client, [0]))
        leader = await leads(stack)
        await all_of(client, range(1, NUM_REQUESTS))
        await first
        counts = num_run(await stack.idle())
        assert counts.pop(leader) == len(PREFIX) + num_own_tokens(NUM_REQUESTS)
        assert list(counts.values()) == [0]


async def test_another_salt_runs_it_for_itself(model: Path) -> None:
    async with running(fleet(model)) as stack, stack.client() as client:
        groups = [range(4), range(4, 8)]
        await asyncio.gather(*(all_of(client, g, cache_salt=s) for g, s in zip(groups, "ab", strict=True)))
        counts = num_run(await stack.idle())
        assert list(counts.values()) == [len(PREFIX) + num_own_tokens(4)] * 2, "one each"


async def test_requests_that_are_not_durable_yet_count_already(model: Path) -> None:
    """Redis stands still while all of them come: what shares the prefix goes to one worker, what does not to both."""
    async with running(fleet(model)) as stack, stack.client() as client:
        foreign = [[251 + i] * 480 for i in range(NUM_REQUESTS)]
        sampling = pb.SamplingParams(max_tokens=1, ignore_eos=True)
        with stack.stopped("redis"):
            reading = [asyncio.create_task(all_of(client, [0]))]
            for number, ids in enumerate(foreign, start=1):
                message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)
                reading.append(asyncio.create_task(collect(client, message)))
                reading.append(asyncio.create_task(all_of(client, [number])))
            await asyncio.sleep(0.5)  # so that all of them wait for Redis
        await asyncio.gather(*reading)
        counts = num_run(await stack.idle()).values()
        assert sum(counts) == len(PREFIX) + num_own_tokens(NUM_REQUESTS + 1) + NUM_REQUESTS * 480
        assert min(counts) > len(PREFIX) / 2, "the worker without the prefix has what does not share it"


async def test_a_short_prefix_draws_nobody(model: Path) -> None:
    """Two blocks that all prompts begin with."""
    async with running(fleet(model)) as stack, stack.client() as client:
        prompts = [[*PREFIX[:32], *[251 + i] * 400] for i in range(20)]
        sampling = pb.SamplingParams(max_tokens=2, ignore_eos=True)
        requests = [pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling) for ids in prompts]
        await asyncio.gather(*(collect(client, message) for message in requests))
        low, high = sorted(num_run(await stack.idle()).values())
        assert high - low <= 2 * 432


async def test_a_leader_that_is_cancelled_is_followed_by_another_at_once(model: Path) -> None:
    """The first follower goes on where it stopped: the rest of the prefix, and nothing twice but a step or two."""
    async with running(fleet(model)) as stack, stack.client() as client:
        first = asyncio.create_task(collect(client, request(0, request_id="leader")))
        await leads(stack)
        followers = asyncio.create_task(all_of(client, range(1, NUM_REQUESTS)))
        await stack.until(lambda status: status.num_live_requests == NUM_REQUESTS)
        await client.cancel("leader")
        began_s = time.monotonic()
        assert (await first)[2].finish_reason == pb.FINISH_REASON_ABORT
        await stack.until(lambda status: [w.num_running for w in status.workers if w.num_running] == [1])
        promoted_s = time.monotonic() - began_s
        print(f"a follower runs {promoted_s:.3f} s after the cancel")
        assert promoted_s < 1.0, "within a step or two"
        await followers
        counts = num_run(await stack.idle())
        assert 0 in counts.values()
        num_most = len(PREFIX) + num_own_tokens(NUM_REQUESTS - 1) + 3 * BATCH_TOKENS
        assert sum(counts.values()) <= num_most


async def test_a_leader_whose_worker_dies_is_followed_by_another_elsewhere(model: Path) -> None:
    """All of them move; there the first computes the prefix, and the others wait for it again."""
    async with running(fleet(model)) as stack, stack.client() as client:
        reading = asyncio.create_task(all_of(client, range(NUM_REQUESTS), resumable=True))
        leader = await leads(stack)
        await stack.until(lambda status: status.num_live_requests == NUM_REQUESTS)
        stack.kill(leader)
        began_s = time.monotonic()
        others = {w.name for w in (await stack.status()).workers} - {leader}
        await stack.until(lambda status: any(num_run(status)[name] for name in others))
        promoted_s = time.monotonic() - began_s
        print(f"a follower has run a step {promoted_s:.3f} s after the kill")
        assert promoted_s < 3.0, "as soon as the death is known"
        await reading
        assert time.monotonic() - began_s < 5.0 + 10 * PREFIX_S
        counts = num_run(await stack.idle())
        assert [counts[name] for name in others] == [len(PREFIX) + num_own_tokens(NUM_REQUESTS)]


async def test_a_dead_leader_is_followed_by_one_worker_of_several(model: Path) -> None:
    async with running(fleet(model, 3)) as stack, stack.client() as client:
        reading = asyncio.create_task(all_of(client, range(NUM_REQUESTS), resumable=True))
        leader = await leads(stack)
        await stack.until(lambda status: status.num_live_requests == NUM_REQUESTS)
        stack.kill(leader)
        await reading
        counts = num_run(await stack.idle())
        del counts[leader]
        assert sum(counts.values()) == len(PREFIX) + num_own_tokens(NUM_REQUESTS)
