"""`make bench-step`: what one step costs beside the model, with timed steps in its place.

Real processes and a real Redis; only the model's forward is a wait. Each row is one run: N sequences decode at once for
some seconds; the worker measures the gap between its steps, the scheduler its own processor time. First without
streams (requests are resumable and their clients have left), then with every token streamed to a client process.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import redis

from tests.checkpoints import make_checkpoint
from tests.stack import ROOT, Stack, greedy, running

PROMPT_TOKENS = 32
WARM_UP_S = 1.0


@dataclass(frozen=True)
class Case:
    """One row."""

    step_s: float
    num_sequences: int
    streamed: bool = False
    added_redis_s: float = 0.0


@dataclass(frozen=True)
class Figures:
    """What one run gave; times in seconds."""

    steps_per_s: float
    gap_p50_s: float
    gap_p99_s: float
    back_to_back: float
    scheduler_cpu_s: float  # per sequence and step
    engine_s: float  # per sequence and step
    delivery_s: float  # per sequence and step
    redis_script_s: float
    redis_round_trip_s: float
    link_s: float  # per step


async def run(case: Case, model: Path, seconds: float) -> Figures:
    """One case, measured between two looks at the status."""
    flags = ("--timed-step-s", str(case.step_s), "--num-blocks", "120000", "--max-num-seqs", "256")
    # A plan for each step, however short.
    stack = Stack(model, 1, ("--plan-ms", "0"), (*flags, "--max-num-batched-tokens", "2048"))
    with contextlib.ExitStack() as cleanup:
        if case.added_redis_s:
            stack.redis_url = f"unix://{stack.directory}/slow.sock"
            stack.start_redis()
            proxy = _start_proxy(stack, case.added_redis_s / 2)
            cleanup.callback(proxy.kill)
        async with running(stack):
            return await _measure(case, stack, seconds)


async def _measure(case: Case, stack: Stack, seconds: float) -> Figures:
    num_steps = int((seconds + 4 * WARM_UP_S) / case.step_s)
    clients = _start_clients(case, stack, min(num_steps, 16_000))
    try:
        await stack.until(lambda s: s.workers[0].num_running == case.num_sequences)
        await asyncio.sleep(WARM_UP_S)
        before, redis_before, began = await stack.until(lambda s: True), _script_stats(stack), time.perf_counter()
        await asyncio.sleep(seconds)
        after, redis_after, ended = await stack.until(lambda s: True), _script_stats(stack), time.perf_counter()
    finally:
        clients.kill()
        clients.wait()
    old, new = before.workers[0], after.workers[0]
    assert new.num_running == case.num_sequences, "the run was over too early"
    steps = new.num_steps - old.num_steps
    rows = steps * case.num_sequences
    scripts = redis_after[0] - redis_before[0]
    return Figures(
        steps_per_s=steps / (ended - began),
        gap_p50_s=new.gap_p50_s,
        gap_p99_s=new.gap_p99_s,
        back_to_back=new.back_to_back,
        scheduler_cpu_s=(after.scheduler_cpu_s - before.scheduler_cpu_s) / rows,
        engine_s=(sum(new.phase_s.values()) - sum(old.phase_s.values())) / rows,
        delivery_s=(after.delivery_s - before.delivery_s) / rows,
        redis_script_s=(redis_after[1] - redis_before[1]) / max(1, scripts),
        redis_round_trip_s=new.redis_round_trip_s,
        link_s=(new.phase_s["link"] - old.phase_s["link"]) / steps,
    )


def _start_proxy(stack: Stack, delay_s: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.load.slow_proxy", f"{stack.directory}/slow.sock"]
    return subprocess.Popen([*command, str(stack.redis_socket), str(delay_s)], cwd=ROOT)


def _start_clients(case: Case, stack: Stack, max_tokens: int) -> "subprocess.Popen[bytes]":
    """A process of its own, so that the streams' cost on the client's side is not the scheduler's."""
    flags = [stack.address, str(case.num_sequences), str(max_tokens), str(int(case.streamed))]
    return subprocess.Popen([sys.executable, "-m", "tests.load.bench_step", "--client", *flags], cwd=ROOT)


def _script_stats(stack: Stack) -> tuple[int, float]:
    """(calls, seconds) of scripts in Redis so far."""
    with redis.Redis(unix_socket_path=str(stack.redis_socket)) as client:
        stats = client.info("commandstats")["cmdstat_evalsha"]
    return int(stats["calls"]), float(stats["usec"]) / 1e6


async def client_main(address: str, count: int, max_tokens: int, streamed: bool) -> None:
    """Starts `count` requests; reads them to the end, or leaves them once they are accepted."""
    from scheduler.client import PagodaClient

    async with PagodaClient(address) as client:

        async def one(number: int) -> None:
            prompt = [3 + (number * 7 + i) % 250 for i in range(PROMPT_TOKENS)]
            request = greedy(prompt, max_tokens, resumable=True, resume_wait_s=600.0)
            async for _ in client.generate(request):
                if not streamed:
                    return

        await asyncio.gather(*(one(number) for number in range(count)))


def make_model(directory: Path) -> Path:
    """A checkpoint whose configuration allows long sequences; its weights are never run."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = make_checkpoint("llama3", directory)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32_768}))
    return model


def print_row(case: Case, f: Figures) -> None:
    """One line; times in microseconds unless it says ms."""
    times_s = (f.scheduler_cpu_s, f.engine_s, f.delivery_s, f.redis_script_s, f.redis_round_trip_s, f.link_s)
    widths = ("9.2f", "8.2f", "9.2f", "8.0f", "9.0f", "7.0f")
    print(
        f"{case.step_s * 1e3:5.0f} ms {case.num_sequences:5d} {'yes' if case.streamed else 'no':>8s}"
        f" {case.added_redis_s * 1e3:6.0f} ms {f.steps_per_s:9.1f} {f.gap_p50_s * 1e6:8.0f} {f.gap_p99_s * 1e6:8.0f}"
        f" {100 * f.back_to_back:6.1f} % " + " ".join(format(t * 1e6, w) for t, w in zip(times_s, widths, strict=True)),
        flush=True,
    )


def median(runs: list[Figures]) -> Figures:
    """Figure by figure."""
    return Figures(*(statistics.median(values) for values in zip(*map(astuple, runs), strict=True)))


def main() -> None:
    """All cases, or those that the flags name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case; medians are printed")
    parser.add_argument("--step-ms", type=float, nargs="*", default=[2, 5, 20])
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--no-slow-redis", action="store_true")
    flags = parser.parse_args()
    if flags.client:
        address, count, max_tokens, streamed = flags.client
        asyncio.run(client_main(address, int(count), int(max_tokens), streamed == "1"))
        return
    asyncio.run(bench(flags))


def machine_line() -> str:
    """How fast this machine runs plain Python now: figures of two runs compare only where this does."""
    times_s = []
    for _ in range(3):
        start, total = time.perf_counter(), 0
        for i in range(1_000_000):
            total += i
        times_s.append(time.perf_counter() - start)
    return f"{os.cpu_count()} cores; a million additions in Python take {min(times_s) * 1e3:.0f} ms"


async def bench(flags: argparse.Namespace) -> None:
    """Runs the cases one after the other."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        print(machine_line())
        print(
            "   step  seqs streamed  +redis   steps/s  gap p50  gap p99  in time  sched/row engine/r deliver/r"
            "  script round trip   link\n"
            "(gap, per-row, script, round trip and link times in microseconds; row = one sequence in one step)"
        )
        for step_ms, count in itertools.product(flags.step_ms, flags.sequences):
            base = Case(step_ms / 1e3, count)
            await compare(base, model, flags)
        print(machine_line())


async def compare(base: Case, model: Path, flags: argparse.Namespace) -> None:
    """One case without streams, with them, and with a slow Redis: in turn, medians over the rounds."""
    slow = replace(base, added_redis_s=0.005)
    cases = [base, replace(base, streamed=True), *([] if flags.no_slow_redis else [slow])]
    runs: dict[Case, list[Figures]] = {case: [] for case in cases}
    for _ in range(flags.rounds):
        for case in cases:
            runs[case].append(await run(case, model, flags.seconds))
    for case in cases:
        print_row(case, median(runs[case]))
    if slow in runs:
        ratios = [s.steps_per_s / p.steps_per_s for s, p in zip(runs[slow], runs[base], strict=True)]
        print(f"         5 ms more to Redis and back: {100 * (1 - statistics.median(ratios)):.1f} % fewer steps/s")


if __name__ == "__main__":
    main()
