"""Parallel sampling: every choice is what a request of its seed alone would be, however it came to its blocks."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from scheduler.wire import choice_seed
from tests.checkpoints import make_checkpoint
from tests.stack import STEADY, Received, Stack, collect, collect_choices, running

NUM_TOKENS = 40
SEED = 2**63 + 5
# (prompt, choices): within a block, at a block's end, one past it, a single token, and the most that there may be.
REQUESTS = (
    (tuple(range(10, 33)), 4),
    (tuple(range(40, 72)), 3),
    (tuple(range(90, 123)), 2),
    ((200,), 3),
    (tuple(range(10, 30)), 5),
)
Outputs = Sequence[list[list[int]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("parallel"))


def sampled(prompt: Sequence[int], n: int, seed: int = SEED) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(seed=seed, temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, n=n, resumable=True)


async def outputs(client: PagodaClient, received: Received | None = None) -> Outputs:
    results = await asyncio.gather(*(collect_choices(client, sampled(*r), received) for r in REQUESTS))
    return [
        [[token for delta in choices[i] for token in delta.token_ids] for i in range(n)]
        for choices, (_, n) in zip(results, REQUESTS, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Outputs:
    """Each choice as a request of its own, alone on an idle worker."""

    async def one_by_one() -> Outputs:
        async with running(Stack(checkpoint, worker_flags=("--num-blocks", "200"))) as stack, stack.client() as client:
            return [
                [(await collect(client, sampled(prompt, 1, choice_seed(SEED, i))))[0] for i in range(n)]
                for prompt, n in REQUESTS
            ]

    alone = asyncio.run(one_by_one())
    assert len({tuple(tokens) for choices in alone for tokens in choices}) == sum(n for _, n in REQUESTS)
    return alone


@pytest.mark.parametrize(
    ("num_workers", "num_blocks", "chunk", "max_num_seqs"),
    [(1, 200, 2048, 64), (1, 200, 5, 64), (1, 200, 2048, 3), (1, 9, 16, 64), (2, 9, 7, 64)],
)
async def test_choices_are_what_they_would_be_alone(
    checkpoint: Path, expected: Outputs, num_workers: int, num_blocks: int, chunk: int, max_num_seqs: int
) -> None:
    flags = ("--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(chunk), "--poison-freed-blocks")
    stack = Stack(checkpoint, num_workers, ("--overcommit", "8"), (*flags, "--max-num-seqs", str(max_num_seqs)))
    async with running(stack), stack.client() as client:
        assert await outputs(client) == expected
        workers = (await stack.idle()).workers
        if num_blocks == 9:
            assert sum(worker.num_preemptions for worker in workers) > 0


async def test_the_prompt_is_computed_once(checkpoint: Path) -> None:
    """One prefill, and then a token of each choice a step; the first tokens come from the prompt's own logits."""
    prompt, n = tuple(range(10, 110)), 8
    async with running(Stack(checkpoint, worker_flags=("--num-blocks", "200"))) as stack, stack.client() as client:
        deltas = await collect_choices(client, sampled(prompt, n))
        worker = (await stack.idle()).workers[0]
    assert worker.num_step_tokens == len(prompt) + n * (NUM_TOKENS - 1)
    assert worker.num_output_tokens == n * NUM_TOKENS
    for choice, own in deltas.items():
        assert own[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert own[-1].usage == pb.Usage(
            num_prompt_tokens=100, num_cached_tokens=100 if choice else 0, num_output_tokens=NUM_TOKENS
        )


@pytest.mark.parametrize("kill", ["worker", "worker-gone", "scheduler", "redis"])
@pytest.mark.parametrize("num_received", [1, 120])
async def test_through_a_kill(checkpoint: Path, expected: Outputs, kill: str, num_received: int) -> None:
    flags = ("--num-blocks", "200", "--max-num-batched-tokens", "16", "--poison-freed-blocks")
    stack = Stack(checkpoint, 2, STEADY, flags)
    async with running(stack), stack.client() as client:
        received = Received()
        reading = asyncio.create_task(outputs(client, received))
        await received.at_least(num_received)
        assert not reading.done()
        stack.hurt(kill)
        assert await reading == expected
        await stack.idle()


@pytest.mark.parametrize("kill", ["scheduler", "redis"])
async def test_a_choice_that_had_ended_ends_once(checkpoint: Path, expected: Outputs, kill: str) -> None:
    """A client that comes back says how many tokens it has, not whether that was all: it is told of the end again."""
    prompt, n = REQUESTS[-1]
    alone = expected[-1]
    short, last_id = next((i, own[0]) for i, own in enumerate(alone) if sum(own[0] in other for other in alone) == 1)
    request = sampled(prompt, n)
    request.sampling.max_tokens = 4 * NUM_TOKENS
    request.sampling.stop_token_ids.append(last_id)
    found: dict[int, list[int]] = {i: [] for i in range(n)}
    ended: list[int] = []
    async with running(Stack(checkpoint, 2, STEADY, ("--num-blocks", "200"))) as stack, stack.client() as client:
        async for delta in client.generate(request):
            found[delta.choice] += delta.token_ids
            if delta.finish_reason:
                ended.append(delta.choice)
                if delta.choice == short:
                    stack.hurt(kill)
    assert ended[0] == short
    assert sorted(ended) == list(range(n))
    assert found[short] == [last_id]
    assert all(found[i][:NUM_TOKENS] == alone[i] for i in range(n) if i != short)
