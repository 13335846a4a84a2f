"""Greedy output equals transformers' token for token in float32, whatever happens on the way."""

import asyncio
import random
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.stack import Stack, collect, greedy, running

NEAR_TIE = 1e-4
"""Where the reference's two best logits are closer, a first difference is reported and not failed."""


class Reference:
    """transformers' own greedy generate, one prompt at a time."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def __call__(self, prompt: list[int], num_tokens: int) -> list[int]:
        with torch.no_grad():
            output = self._model.generate(
                torch.tensor([prompt]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )
        return output[0, len(prompt) :].tolist()

    def explain(self, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
        """Empty where the outputs are equal or differ first at a near tie; else what differs."""
        if ours == theirs:
            return ""
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        if len(ours) != len(theirs):
            return f"{len(ours)} tokens, not {len(theirs)}"
        with torch.no_grad():
            logits = self._model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
        best = logits.topk(2).values
        gap = float(best[0] - best[1])
        if gap < NEAR_TIE:
            print(f"near tie at {at}: {gap:.2e}")
            return ""
        return f"first difference at {at}, where the best two logits are {gap:.2e} apart: {ours[at]} for {theirs[at]}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def prompts_of(count: int, seed: int, vocab_size: int = 300) -> list[list[int]]:
    """Mixed lengths, some with a common prefix of some blocks."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, vocab_size) for _ in range(40)]
    prompts = []
    for i in range(count):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.choice((1, 5, 15, 16, 17, 33, 60)))]
        prompts.append(prefix + own if i % 2 else own)
    return prompts


async def check(stack: Stack, reference: Reference, prompts: list[list[int]], num_tokens: int, **fields) -> list:
    async with stack.client() as client:
        results = await asyncio.gather(*(collect(client, greedy(p, num_tokens, **fields)) for p in prompts))
    for prompt, (ours, _, _) in zip(prompts, results, strict=True):
        assert reference.explain(prompt, ours, reference(prompt, num_tokens)) == ""
    return results


@pytest.mark.parametrize("num_batched_tokens", [1, 7, 64])
async def test_chunks_and_prefix_hits(checkpoint: Path, reference: Reference, num_batched_tokens: int) -> None:
    flags = ("--num-blocks", "200", "--max-num-batched-tokens", str(num_batched_tokens), "--poison-freed-blocks")
    async with running(Stack(checkpoint, worker_flags=flags)) as stack:
        count = 4 if num_batched_tokens == 1 else 12
        await check(stack, reference, prompts_of(count, 1), 20)
        await check(stack, reference, prompts_of(count, 1), 20)
        status = await stack.until(lambda s: True)
        assert status.workers[0].num_prefix_hit_tokens > 0


async def test_preemption(checkpoint: Path, reference: Reference) -> None:
    flags = ("--num-blocks", "14", "--max-num-batched-tokens", "64", "--poison-freed-blocks")
    async with running(Stack(checkpoint, worker_flags=flags, scheduler_flags=("--overcommit", "8"))) as stack:
        await check(stack, reference, prompts_of(10, 2), 60)
        status = await stack.until(lambda s: True)
        assert status.workers[0].num_preemptions > 0


async def test_worker_kill_one_worker(checkpoint: Path, reference: Reference) -> None:
    flags = ("--num-blocks", "200", "--max-num-batched-tokens", "64")
    async with running(Stack(checkpoint, worker_flags=flags)) as stack:
        work = asyncio.create_task(check(stack, reference, prompts_of(8, 3), 100, resumable=True))
        await stack.until(lambda s: s.workers[0].num_output_tokens > 100)
        stack.kill("worker-0")
        stack.start_worker(0)
        await work


async def test_worker_kill_two_workers(checkpoint: Path, reference: Reference) -> None:
    flags = ("--num-blocks", "200", "--max-num-batched-tokens", "64")
    async with running(Stack(checkpoint, num_workers=2, worker_flags=flags)) as stack:
        work = asyncio.create_task(check(stack, reference, prompts_of(8, 4), 100, resumable=True))
        await stack.until(lambda s: sum(w.num_output_tokens for w in s.workers) > 100)
        stack.kill("worker-1")
        await work


async def test_scheduler_kill(checkpoint: Path, reference: Reference) -> None:
    flags = ("--num-blocks", "200", "--max-num-batched-tokens", "64")
    async with running(Stack(checkpoint, num_workers=2, worker_flags=flags)) as stack:
        work = asyncio.create_task(check(stack, reference, prompts_of(8, 5), 150, resumable=True))
        await stack.until(lambda s: sum(w.num_output_tokens for w in s.workers) > 100)
        stack.kill("scheduler", signal.SIGKILL)
        stack.start_scheduler()
        await work
        status = await stack.until(lambda s: True)
        assert sum(w.num_step_tokens for w in status.workers) < 8 * 150, "prompts were prefilled again"
