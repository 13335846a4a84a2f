"""Beam search through real processes: transformers' own hypotheses, whatever the pool, the chunks and who dies."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pagoda.v1 import generation_pb2 as pb
from transformers import AutoModelForCausalLM

from scheduler.client import PagodaClient
from tests.checkpoints import make_checkpoint
from tests.stack import STEADY, Received, Stack, collect, collect_choices, greedy, running

NUM_TOKENS = 24
# (prompt, beams, hypotheses, length penalty, early stopping, ids that end)
SEARCHES = (
    (tuple(range(10, 33)), 4, 4, 1.0, pb.EARLY_STOPPING_UNSPECIFIED, ()),
    (tuple(range(40, 72)), 2, 1, 0.0, pb.EARLY_STOPPING_FULL, tuple(range(0, 300, 9))),
    (tuple(range(90, 123)), 6, 3, 2.0, pb.EARLY_STOPPING_NEVER, tuple(range(0, 300, 17))),
    ((200,), 3, 2, 1.0, pb.EARLY_STOPPING_UNSPECIFIED, tuple(range(0, 300, 11))),
)
EARLY = {pb.EARLY_STOPPING_UNSPECIFIED: False, pb.EARLY_STOPPING_FULL: True, pb.EARLY_STOPPING_NEVER: "never"}
Hypotheses = Sequence[list[tuple[list[int], float]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("beams"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Hypotheses:
    """transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt, width, n, length_penalty, early_stopping, ends in SEARCHES:
        output = model.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            length_penalty=length_penalty,
            early_stopping=EARLY[early_stopping],
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        outputs = [_until(sequence[len(prompt) :].tolist(), ends) for sequence in output.sequences]
        found.append(list(zip(outputs, output.sequences_scores.tolist(), strict=True)))
    assert len({len(tokens) for hypotheses in found for tokens, _ in hypotheses}) > 3, "all of one length"
    return found


def _until(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding behind an end."""
    for i, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: i + 1]
    return token_ids


def searched(prompt: Sequence[int], width: int, n: int, *how: object) -> pb.GenerateRequest:
    length_penalty, early_stopping, ends = how
    sampling = pb.SamplingParams(
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        stop_token_ids=ends,  # type: ignore[arg-type]
        beam_width=width,
        length_penalty=length_penalty,  # type: ignore[arg-type]
        early_stopping=early_stopping,  # type: ignore[arg-type]
    )
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, n=n, resumable=True)


async def hypotheses(client: PagodaClient) -> Hypotheses:
    results = await asyncio.gather(*(collect_choices(client, searched(*search)) for search in SEARCHES))
    found = []
    for choices, search in zip(results, SEARCHES, strict=True):
        assert sorted(choices) == list(range(search[2]))
        own = [choices[i] for i in range(search[2])]
        found.append([([t for delta in deltas for t in delta.token_ids], deltas[-1].score) for deltas in own])
        for deltas, (token_ids, _) in zip(own, found[-1], strict=True):
            by_id = token_ids[-1] in search[5]
            assert deltas[-1].finish_reason == (pb.FINISH_REASON_STOP if by_id else pb.FINISH_REASON_LENGTH)
    return found


def assert_same(found: Hypotheses, expected: Hypotheses) -> None:
    assert [[tokens for tokens, _ in own] for own in found] == [[tokens for tokens, _ in own] for own in expected]
    for own, theirs in zip(found, expected, strict=True):
        assert [score for _, score in own] == pytest.approx([score for _, score in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("num_workers", "num_blocks", "chunk", "max_num_seqs"),
    [(1, 200, 2048, 64), (1, 200, 5, 64), (1, 20, 16, 64), (1, 200, 2048, 4), (2, 20, 7, 64)],
)
async def test_hypotheses_are_transformers_own(
    checkpoint: Path, expected: Hypotheses, num_workers: int, num_blocks: int, chunk: int, max_num_seqs: int
) -> None:
    flags = ("--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(chunk), "--poison-freed-blocks")
    stack = Stack(checkpoint, num_workers, ("--overcommit", "8"), (*flags, "--max-num-seqs", str(max_num_seqs)))
    async with running(stack), stack.client() as client:
        assert_same(await hypotheses(client), expected)
        workers = (await stack.idle()).workers
        if max_num_seqs < 6:
            assert workers[0].num_preemptions > 0, "a search of six beams takes turns"


@pytest.mark.parametrize("kill", ["worker", "worker-gone", "scheduler", "redis"])
@pytest.mark.parametrize("num_received", [2, 15])
async def test_through_a_kill(checkpoint: Path, expected: Hypotheses, kill: str, num_received: int) -> None:
    """A plain request beside the searches tells how far they are."""
    stack = Stack(checkpoint, 2, STEADY, ("--num-blocks", "200", "--max-num-batched-tokens", "64"))
    async with running(stack), stack.client() as client:
        received = Received()
        beside = asyncio.create_task(collect(client, greedy((1, 2, 3), 60, resumable=True), received))
        reading = asyncio.create_task(hypotheses(client))
        await received.at_least(num_received)
        assert not reading.done()
        stack.hurt(kill)
        assert_same(await reading, expected)
        await beside
        await stack.idle()
