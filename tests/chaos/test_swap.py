"""A pool of an eighth of what the batch needs: nothing fails, and the tokens are transformers' own, by whatever means.

Every sequence is admitted for want of foresight and preempted again and again; it comes back by a swap, computed again,
or by what is cheaper. `pytest tests/chaos/test_swap.py -s` prints what each took.
"""

import asyncio
import random
import time
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from tests.chaos.reference import reference_of
from tests.checkpoints import make_checkpoint
from tests.stack import Received, Stack, collect, greedy, running

NUM_REQUESTS = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 10, 118
NEEDED_BLOCKS = NUM_REQUESTS * 8
POOL_BLOCKS = NEEDED_BLOCKS // 8
HOST_BLOCKS = 2 * NEEDED_BLOCKS
KILLS = ("none", "worker", "scheduler", "redis")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return make_checkpoint("llama3", tmp_path_factory.mktemp("llama3"))


def prompts() -> list[list[int]]:
    """Nothing in common."""
    rng = random.Random(1)
    return [[rng.randrange(3, 300) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]


async def serve(stack: Stack, kill: str = "none") -> pb.WorkerStatus:
    """All requests at once, to their ends; checks every token."""
    async with running(stack), stack.client() as client:
        received, start = Received(), time.perf_counter()
        requests = [greedy(prompt, OUTPUT_TOKENS, resumable=True) for prompt in prompts()]
        reading = asyncio.gather(*(collect(client, request, received) for request in requests))
        await received.at_least(NUM_REQUESTS * OUTPUT_TOKENS // 3)
        stack.hurt(kill)
        outputs = await asyncio.wait_for(reading, 120)
        seconds = time.perf_counter() - start
        for prompt, (ours, _, _) in zip(prompts(), outputs, strict=True):
            reference_of(stack.model).check(prompt, ours, OUTPUT_TOKENS)
        (worker,) = (await stack.idle()).workers
    print(
        f"\n{' '.join(stack.scheduler_flags[-2:])}, kill {kill}: {seconds:.1f} s, {worker.num_preemptions} preempted,"
        f" {worker.num_step_tokens} tokens run, {worker.num_blocks_swapped_out} blocks out,"
        f" {worker.num_blocks_swapped_in} in"
    )
    return worker


def a_stack(model: Path, preemption: str, num_host_blocks: int = HOST_BLOCKS) -> Stack:
    flags = ("--num-blocks", str(POOL_BLOCKS), "--num-host-blocks", str(num_host_blocks), "--poison-freed-blocks")
    return Stack(model, 1, ("--overcommit", "100", "--preemption", preemption), flags)


@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
async def test_an_eighth_of_the_memory(preemption: str, model: Path) -> None:
    worker = await serve(a_stack(model, preemption))
    assert worker.num_preemptions > NUM_REQUESTS // 2
    num_at_least = NUM_REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS - 1)
    if preemption == "recompute":
        assert worker.num_blocks_swapped_in == 0
        assert worker.num_step_tokens > num_at_least + worker.num_preemptions * 16
    else:
        assert worker.num_blocks_swapped_in > worker.num_preemptions, "several blocks each time"
        # Computed again: the last block, and what was not out in time.
        assert worker.num_step_tokens < num_at_least + worker.num_preemptions * 32


@pytest.mark.parametrize("kill", KILLS[1:])
async def test_a_process_dies_while_blocks_move(kill: str, model: Path) -> None:
    worker = await serve(a_stack(model, "swap"), kill)
    assert worker.num_blocks_swapped_in > 0


async def test_a_host_pool_that_is_too_small(model: Path) -> None:
    worker = await serve(a_stack(model, "swap", num_host_blocks=10))
    assert worker.num_preemptions > 0
