"""best_of: the choices that come are those that transformers' own log probabilities rank best, whoever dies meanwhile.

What the choices sample is what requests of their seeds alone sample; how likely that is, transformers says.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pagoda.v1 import generation_pb2 as pb
from transformers import AutoModelForCausalLM

from scheduler.client import PagodaClient
from scheduler.wire import choice_seed
from tests.checkpoints import make_checkpoint
from tests.stack import STEADY, Received, Stack, collect, collect_choices, greedy, running

NUM_TOKENS = 24
SEED = 2**62 + 11
# (prompt, n, best_of, sampling): temperature and filters change what is sampled, and nothing of how it is ranked.
REQUESTS: tuple[tuple[tuple[int, ...], int, int, dict[str, float]], ...] = (
    (tuple(range(10, 33)), 2, 5, {"temperature": 1.0}),
    (tuple(range(40, 72)), 1, 4, {"temperature": 1.6, "top_k": 50}),
    (tuple(range(90, 123)), 3, 8, {"temperature": 0.6, "top_p": 0.9, "min_tokens": 10}),
    ((200,), 2, 3, {"temperature": 0.0}),
)
ENDS = tuple(range(0, 300, 23))
"""Ids that end a choice, so that there are choices of many lengths."""
Ranked = Sequence[list[tuple[list[int], float]]]


def request(prompt: Sequence[int], seed: int, sampling: dict[str, float], **fields: object) -> pb.GenerateRequest:
    params = pb.SamplingParams(
        seed=seed,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        stop_token_ids=ENDS,
        **sampling,  # type: ignore[arg-type]
    )
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=params, resumable=True, **fields)  # type: ignore[arg-type]


def best_of(prompt: Sequence[int], n: int, count: int, sampling: dict[str, float]) -> pb.GenerateRequest:
    """Sent again, it is read again."""
    message = request(prompt, SEED, sampling, n=n, request_id=f"best-{len(prompt)}")
    message.sampling.best_of = count
    return message


async def outputs(client: PagodaClient) -> Ranked:
    results = await asyncio.gather(*(collect_choices(client, best_of(*r)) for r in REQUESTS))
    found = []
    for choices, (_, n, _, _) in zip(results, REQUESTS, strict=True):
        assert sorted(choices) == list(range(n))
        own = [choices[number] for number in range(n)]
        found.append([([t for delta in deltas for t in delta.token_ids], deltas[-1].score) for deltas in own])
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("best-of"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Ranked:
    """Each choice as a request of its own, alone on an idle worker; then ranked."""

    async def one_by_one() -> list[list[list[int]]]:
        async with running(Stack(checkpoint, worker_flags=("--num-blocks", "200"))) as stack, stack.client() as client:
            return [
                [(await collect(client, request(prompt, choice_seed(SEED, i), how)))[0] for i in range(count)]
                for prompt, _, count, how in REQUESTS
            ]

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    best = []
    for (prompt, n, _, _), choices in zip(REQUESTS, asyncio.run(one_by_one()), strict=True):
        scored = [(tokens, log_probability(model, prompt, tokens)) for tokens in choices]
        scored.sort(key=lambda entry: -entry[1])  # equals stay in their order
        best.append(scored[:n])
        others = [score for tokens, score in scored if tokens not in [t for t, _ in scored[:n]]]
        assert all(scored[n - 1][1] - score > 1e-2 for score in others), "too near to tell"
    assert len({len(tokens) for own in best for tokens, _ in own}) > 3, "all of one length"
    return best


def log_probability(model: torch.nn.Module, prompt: Sequence[int], output: list[int]) -> float:
    """The sum over the output's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None])
    return float(own.double().sum())


def assert_same(found: Ranked, expected: Ranked) -> None:
    assert [[tokens for tokens, _ in own] for own in found] == [[tokens for tokens, _ in own] for own in expected]
    for own, theirs in zip(found, expected, strict=True):
        assert [score for _, score in own] == pytest.approx([score for _, score in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("num_workers", "num_blocks", "chunk", "max_num_seqs"),
    [(1, 200, 2048, 64), (1, 200, 5, 64), (1, 9, 16, 64), (1, 200, 2048, 3), (2, 9, 7, 64)],
)
async def test_the_n_best_are_those_that_transformers_ranks_best(
    checkpoint: Path, expected: Ranked, num_workers: int, num_blocks: int, chunk: int, max_num_seqs: int
) -> None:
    flags = ("--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(chunk), "--poison-freed-blocks")
    stack = Stack(checkpoint, num_workers, ("--overcommit", "8"), (*flags, "--max-num-seqs", str(max_num_seqs)))
    async with running(stack), stack.client() as client:
        assert_same(await outputs(client), expected)
        workers = (await stack.idle()).workers
        if num_blocks == 9:
            assert sum(worker.num_preemptions for worker in workers) > 0


@pytest.mark.parametrize("kill", ["worker", "worker-gone", "scheduler", "redis"])
@pytest.mark.parametrize("num_received", [2, 15])
async def test_through_a_kill(checkpoint: Path, expected: Ranked, kill: str, num_received: int) -> None:
    """A plain request beside them tells how far they are. What the logs say afterwards is the same to the bit."""
    stack = Stack(checkpoint, 2, STEADY, ("--num-blocks", "200", "--max-num-batched-tokens", "64"))
    async with running(stack), stack.client() as client:
        received = Received()
        beside = asyncio.create_task(collect(client, greedy((1, 2, 3), 60, resumable=True), received))
        reading = asyncio.create_task(outputs(client))
        await received.at_least(num_received)
        assert not reading.done()
        stack.hurt(kill)
        found = await reading
        assert_same(found, expected)
        await beside
        await stack.idle()
        assert await outputs(client) == found


async def test_a_new_scheduler_tells_the_same_of_what_is_over(checkpoint: Path, expected: Ranked) -> None:
    """From the logs alone: the scores to the bit, and the order."""
    async with running(Stack(checkpoint, worker_flags=("--num-blocks", "200"))) as stack, stack.client() as client:
        before = await collect_choices(client, best_of(*REQUESTS[2]))
        stack.kill("scheduler")
        stack.start_scheduler()
        await stack.ready()
        after: dict[int, list[pb.Delta]] = {}
        async for delta in client.attach("best-33", [0] * 3):
            after.setdefault(delta.choice, []).append(delta)
        assert [before[i][-1] for i in range(3)] == [after[i][-1] for i in range(3)]
        assert [before[i][-1].score for i in range(3)] == pytest.approx([score for _, score in expected[2]], rel=1e-4)
