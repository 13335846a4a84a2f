"""Random numbers belong to (seed, output index): load, preemption and kills change no sampled token."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.chaos.test_exactness import prompts_of
from tests.checkpoints import make_checkpoint
from tests.stack import STEADY, Received, Stack, collect, running

NUM_TOKENS = 60
SAMPLING = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("sampled"))


def sampled_requests() -> list[pb.GenerateRequest]:
    requests = []
    for i, prompt in enumerate(prompts_of(seed=3)):
        sampling = pb.SamplingParams(seed=i * 2**60 + 7, max_tokens=NUM_TOKENS, ignore_eos=True, **SAMPLING[i % 4])
        requests.append(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, resumable=True))
    return requests


async def outputs(client: PagodaClient, received: Received | None = None) -> Sequence[list[int]]:
    results = await asyncio.gather(*(collect(client, request, received) for request in sampled_requests()))
    return [token_ids for token_ids, _, _ in results]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Sequence[list[int]]:
    """Each request alone, on an idle worker."""

    async def one_by_one() -> list[list[int]]:
        flags = ("--num-blocks", "200")
        async with running(Stack(checkpoint, worker_flags=flags)) as stack, stack.client() as client:
            return [(await collect(client, request))[0] for request in sampled_requests()]

    alone = asyncio.run(one_by_one())
    assert len({tuple(tokens[:10]) for tokens in alone}) == len(alone)
    return alone


@pytest.mark.parametrize(("num_workers", "num_blocks", "chunk"), [(1, 200, 2048), (1, 11, 16), (2, 11, 7)])
async def test_in_a_batch(
    checkpoint: Path, expected: Sequence[list[int]], num_workers: int, num_blocks: int, chunk: int
) -> None:
    flags = ("--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(chunk))
    stack = Stack(checkpoint, num_workers, ("--overcommit", "8"), flags)
    async with running(stack), stack.client() as client:
        reading = asyncio.create_task(outputs(client))
        if chunk == 16:
            await stack.contended("worker-0", len(expected))
        assert await reading == expected
        if chunk == 16:
            assert (await stack.idle()).workers[0].num_preemptions > 0


@pytest.mark.parametrize("kill", ["worker", "worker-gone", "scheduler", "redis"])
async def test_through_a_kill(checkpoint: Path, expected: Sequence[list[int]], kill: str) -> None:
    stack = Stack(checkpoint, 2, STEADY, ("--num-blocks", "200", "--max-num-batched-tokens", "64"))
    async with running(stack), stack.client() as client:
        received = Received()
        reading = asyncio.create_task(outputs(client, received))
        await received.at_least(100)
        assert not reading.done()
        stack.hurt(kill)
        assert await reading == expected
        await stack.idle()
