"""Greedy output equals transformers' token for token in float32, whatever happens on the way.

Every pair of conditions meets in `make test`; their full product is slow and runs in `make test-all`.
"""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.pairwise import pairwise, product
from tests.chaos.reference import reference_of
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.stack import ROOT, STEADY, Received, Stack, collect, greedy, running

DEMO_MODEL = ROOT / "deploy" / "demo" / "model"
NUM_TOKENS = 40
PREFIX_TOKENS = 40
OWN_LENGTHS = (1, 60, 16, 17, 5, 33)
SMALL_POOL = 11
"""Blocks: the longest request takes 9 of them, all requests together 35."""
HOST_POOL = 40
FACTORS = {
    "family": (*FAMILIES, "demo"),
    "chunk": (1, 7, 16, 2048),
    "hits": (False, True),
    "workers": (1, 2),
    "pool": ("ample", "small", "swapped"),
    "kill": ("none", "worker", "worker-gone", "scheduler", "redis"),
}


@dataclass(frozen=True)
class Case:
    """One row. `hits`: prompts were run before; `pool`: small, and perhaps with a host pool to swap with; `kill`: which
    process dies in mid-stream."""

    family: str
    chunk: int
    hits: bool
    workers: int
    pool: str
    kill: str

    @property
    def preempts(self) -> bool:
        """Whether someone must be preempted: smaller chunks hold admission back, and two workers, or one that starts
        again, may be done with some before it is tight."""
        return self.pool != "ample" and self.chunk >= 16 and self.workers == 1 and self.kill in ("none", "redis")

    def __str__(self) -> str:
        hits = "hits" if self.hits else "cold"
        return f"{self.family}-{self.chunk}-{hits}-{self.workers}w-{self.pool}-{self.kill}"


def is_possible(row: dict[str, object]) -> bool:
    """A worker that stays away needs another one to take its requests."""
    return not (row["kill"] == "worker-gone" and row["workers"] == 1)


CASES = [Case(**row) for row in pairwise(FACTORS, is_possible)]  # type: ignore[arg-type]
MORE_CASES = [case for row in product(FACTORS, is_possible) if (case := Case(**row)) not in CASES]  # type: ignore[arg-type]

SWAPPED_IN: list[int] = []
"""Blocks that came back from the host, in each case with a host pool so far."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by family."""
    made = {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {**made, "demo": DEMO_MODEL}


def prompts_of(seed: int = 0, vocab_size: int = 300) -> list[list[int]]:
    """Mixed lengths, some with a common prefix of some blocks."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, vocab_size) for _ in range(PREFIX_TOKENS)]
    own = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in OWN_LENGTHS]
    return [prefix + tokens if i % 2 else tokens for i, tokens in enumerate(own)]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_greedy_tokens_are_transformers_own(case: Case, checkpoints: dict[str, Path]) -> None:
    await check_case(case, checkpoints[case.family])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
async def test_greedy_tokens_in_every_combination(case: Case, checkpoints: dict[str, Path]) -> None:
    await check_case(case, checkpoints[case.family])


def test_blocks_came_back_from_the_host() -> None:
    """Not in each case, for whoever is preempted may find its blocks where it left them; but in many."""
    if len(SWAPPED_IN) < 10:
        pytest.skip(f"only {len(SWAPPED_IN)} cases with a host pool ran before this")
    assert sum(count > 0 for count in SWAPPED_IN) >= len(SWAPPED_IN) / 4


async def check_case(case: Case, model: Path) -> None:
    if not (model / "config.json").is_file():
        pytest.skip("the demo model is not there")
    num_blocks = 200 if case.pool == "ample" else SMALL_POOL
    flags = ["--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(case.chunk), "--poison-freed-blocks"]
    flags += ["--num-host-blocks", str(HOST_POOL)] if case.pool == "swapped" else []
    scheduler_flags = ("--overcommit", "8", "--preemption", "swap", *(() if case.kill == "none" else STEADY))
    stack = Stack(model, case.workers, scheduler_flags, flags)
    prompts = prompts_of()
    salts = ["" if case.hits else f"salt {i}" for i in range(len(prompts))]
    requests = [greedy(p, NUM_TOKENS, resumable=True, cache_salt=s) for p, s in zip(prompts, salts, strict=True)]
    async with running(stack), stack.client() as client:
        if case.hits:
            await asyncio.gather(*(collect(client, greedy(p, 1)) for p in prompts))
        received = Received()
        reading = asyncio.gather(*(collect(client, request, received) for request in requests))
        if case.preempts:
            await stack.contended("worker-0", len(requests))
        await received.at_least(len(prompts) * NUM_TOKENS // 4)
        assert not reading.done()
        stack.hurt(case.kill)
        outputs = await asyncio.wait_for(reading, 120)
        for prompt, (ours, _, _) in zip(prompts, outputs, strict=True):
            reference_of(model).check(prompt, ours, NUM_TOKENS)
        status = await stack.idle()
    num_hits = sum(last.usage.num_cached_tokens for _, _, last in outputs)
    assert not (num_hits and not case.hits)
    if case.pool == "ample":
        assert num_hits or not case.hits
    if case.preempts:
        assert sum(w.num_preemptions for w in status.workers) > 0
    num_swapped_in = sum(worker.num_blocks_swapped_in for worker in status.workers)
    assert not (num_swapped_in and case.pool != "swapped")
    if case.pool == "swapped":
        SWAPPED_IN.append(num_swapped_in)
