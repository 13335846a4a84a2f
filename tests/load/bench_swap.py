"""`make bench-swap`: a batch in an eighth of the KV memory that it needs, by swap, by recomputing, and by choice.

Every contender is a `pagoda up` of its own with the same random Llama of 33.6M parameters; all take the same requests,
64 of 128 + 256 tokens at once, in turns, and idle meanwhile. All are let into the pool without foresight (--overcommit)
and so preempt each other all the time: that is what is measured. Figures are medians over rounds.

The second table is the host tier: prompts of 1,024 tokens, more of them than the pool holds, asked for in turns; the
time to the first token where nothing is cached, where the host has it, and where the device has it.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.load.bench_engines import Pagoda, Workload, pagoda_up
from tests.load.random_llama import VOCAB_SIZE, make_model

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128, 256
NEEDED_BLOCKS = NUM_REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS) // 16
AN_EIGHTH = NEEDED_BLOCKS // 8
NUM_LONG, LONG_TOKENS = 8, 1024
OVERCOMMIT = 1000
CONTENDERS: dict[str, dict[str, object]] = {
    "all the memory": {"num_blocks": NEEDED_BLOCKS + NUM_REQUESTS},
    "an eighth, foresight": {"num_blocks": AN_EIGHTH, "overcommit": 1},
    "an eighth, recompute": {"num_blocks": AN_EIGHTH, "preemption": "recompute"},
    "an eighth, swap": {"num_blocks": AN_EIGHTH, "preemption": "swap", "num_host_blocks": 2 * NEEDED_BLOCKS},
    "an eighth, auto": {"num_blocks": AN_EIGHTH, "preemption": "auto", "num_host_blocks": 2 * NEEDED_BLOCKS},
}


@dataclass(frozen=True)
class Figures:
    """Of one round."""

    tokens_per_s: float
    num_preemptions: int
    num_tokens_run: int
    num_blocks_out: int
    num_blocks_in: int


def prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Nothing in common."""
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


async def settled(client: PagodaClient) -> pb.WorkerStatus:
    """The only worker, once nothing runs and nothing moves."""
    while True:
        (worker,) = (await client.get_status()).workers
        if not worker.num_running + worker.num_waiting + worker.num_referenced_blocks:
            return worker
        await asyncio.sleep(0.02)


async def a_round(pagoda: Pagoda, seed: int) -> Figures:
    """All requests at once."""
    before = await settled(pagoda.client)
    workload = Workload(prompts(seed, NUM_REQUESTS, PROMPT_TOKENS), [OUTPUT_TOKENS] * NUM_REQUESTS)
    run = await pagoda.run(workload)
    after = await settled(pagoda.client)
    assert run.num_tokens == NUM_REQUESTS * OUTPUT_TOKENS
    counts = ("num_preemptions", "num_step_tokens", "num_blocks_swapped_out", "num_blocks_swapped_in")
    return Figures(run.tokens_per_s, *(getattr(after, name) - getattr(before, name) for name in counts))


async def first_token_s(client: PagodaClient, prompt: list[int]) -> tuple[float, int, int]:
    """Seconds to the first token of a prompt, and the tokens of it that were hits, on the host and in all."""
    (before,) = (await client.get_status()).workers
    began = time.perf_counter()
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(temperature=0, max_tokens=1)
    )
    async for _ in client.generate(request):
        pass
    seconds = time.perf_counter() - began
    after = await settled(client)
    hits = after.num_prefix_hit_tokens - before.num_prefix_hit_tokens
    return seconds, after.num_host_hit_tokens - before.num_host_hit_tokens, hits


async def tiers(pagoda: Pagoda, seed: int) -> dict[str, list[float]]:
    """Seconds to the first token, by where the prefix was."""
    found: dict[str, list[float]] = {"computed": [], "on the host": [], "on the device": []}
    long_prompts = prompts(seed, NUM_LONG, LONG_TOKENS)
    for again in range(2):
        for prompt in long_prompts:
            seconds, num_on_host, num_hits = await first_token_s(pagoda.client, prompt)
            if not again:
                assert num_hits == 0
            elif num_on_host > LONG_TOKENS // 2:
                found["on the host"].append(seconds)
            if not num_hits:
                found["computed"].append(seconds)
    for _ in range(NUM_LONG):
        seconds, num_on_host, num_hits = await first_token_s(pagoda.client, long_prompts[-1])
        if num_hits > LONG_TOKENS // 2 and not num_on_host:
            found["on the device"].append(seconds)
    return found


async def bench(model: Path, flags: argparse.Namespace) -> tuple[dict[str, list[Figures]], dict[str, list[float]]]:
    """Figures by contender; seconds to the first token by tier."""
    figures: dict[str, list[Figures]] = {name: [] for name in CONTENDERS}
    first_s: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        pagodas = {
            name: await stack.enter_async_context(
                pagoda_up(model, **{"dtype": flags.dtype, "overcommit": OVERCOMMIT, **given})
            )
            for name, given in CONTENDERS.items()
        }
        for number in range(flags.rounds + 1):  # the first warms up and does not count
            for name, pagoda in pagodas.items():
                found = await a_round(pagoda, number)
                if number:
                    figures[name].append(found)
                    sys.stderr.write(f"{number} {name}: {found}\n")
            for tier, seconds in (await tiers(pagodas["an eighth, auto"], 1000 + number)).items():
                if number:
                    first_s.setdefault(tier, []).extend(seconds)
    return figures, first_s


def show(figures: dict[str, list[Figures]], first_s: dict[str, list[float]]) -> Iterator[str]:
    """Both tables."""
    yield "| | tokens/s | preemptions | tokens run | blocks out | blocks in |"
    yield "|---|---|---|---|---|---|"
    for name, rounds in figures.items():
        medians = [statistics.median(column) for column in zip(*(asdict(x).values() for x in rounds), strict=True)]
        yield f"| {name} | {' | '.join(f'{x:,.0f}' for x in medians)} |"
    yield ""
    yield f"| a prompt of {LONG_TOKENS:,} tokens | ms to its first token | asked for |"
    yield "|---|---|---|"
    for tier, seconds in first_s.items():
        yield f"| {tier} | {1e3 * statistics.median(seconds):.0f} | {len(seconds)} times |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, first_s = asyncio.run(bench(make_model("tiny", Path(folder) / "tiny"), flags))
    sys.stdout.write("\n".join(show(figures, first_s)) + "\n")
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine()}
        rounds = {name: [asdict(found) for found in of_one] for name, of_one in figures.items()}
        flags.json.write_text(json.dumps(about | {"rounds": rounds, "first_token_s": first_s}, indent=1) + "\n")


if __name__ == "__main__":
    main()
