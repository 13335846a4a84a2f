"""`make bench-streams`: tokens per second that one scheduler process sustains to streaming clients, and what limits it.

Real processes and a real Redis; workers wait instead of computing and stamp their tokens with the end of their step
(see stamped_worker.py), so that a client knows of each token how long it was on its way: result to scheduler, script
to Redis, detokenizer, stream. Sequences decode at once, each read by a stream; a client asks for its tokens by as many
as come in --coalesce-ms. Processor time is what the kernel says of each process.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.load.bench_step import machine_line
from tests.load.harness.machine import describe_machine
from tests.load.stamped_worker import FIRST_STAMP, NUM_STAMPS, WRAP_S, ages_s
from tests.stack import ROOT, Stack, greedy, running

MODEL = ROOT / "deploy/demo/model"
MAX_MODEL_LEN = 1 << 15
PROMPT_TOKENS = 16
WARM_UP_S = 1.5
SCHEDULER_FLAGS = ("--max-model-len", str(MAX_MODEL_LEN))


@dataclass(frozen=True)
class Case:
    """One row: `num_streams` over `num_workers`, each of which makes a step in `step_s`."""

    num_streams: int
    step_s: float
    num_workers: int = 1
    coalesce_s: float = 0.02
    num_clients: int = 1

    @property
    def stream_interval(self) -> int:
        """Tokens from one message to the next, so that the first waits for the last no longer than coalesce_s."""
        return max(1, int(self.coalesce_s / self.step_s))

    @property
    def asked_tokens_per_s(self) -> float:
        """If no step came late."""
        return self.num_streams / self.step_s


@dataclass(frozen=True)
class Figures:
    """What a case gave."""

    tokens_per_s: float
    messages_per_s: float
    delay_p50_ms: float
    delay_p99_ms: float
    cores: dict[str, float]
    """Processor time over the time that passed, by process."""
    engine_cores: float
    """Of the scheduler: its loop over rows ..."""
    delivery_cores: float
    """... and making deltas; the rest is gRPC and asyncio."""


async def run(case: Case, model: Path, seconds: float) -> Figures:
    """One case."""
    stack = Stack(model, 0, SCHEDULER_FLAGS)
    async with running(stack):
        for number in range(case.num_workers):
            _start_worker(stack, f"worker-{number}", case)
        await stack.ready(case.num_workers)
        clients = [_start_client(stack, case, number) for number in range(case.num_clients)]
        try:
            await stack.until(lambda s: sum(w.num_running for w in s.workers) == case.num_streams)
            return await _measure(stack, case, clients, seconds)
        finally:
            for client in clients:
                client.kill()
                client.wait()


def _start_worker(stack: Stack, name: str, case: Case) -> None:
    flags = ("--timed-step-s", str(case.step_s), "--num-blocks", str(1 << 20), "--max-num-seqs", "512")
    command = [sys.executable, "-m", "tests.load.stamped_worker", *stack.worker_argv(name), *flags]
    with (stack.directory / f"{name}.log").open("ab") as log:
        stack.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def _start_client(stack: Stack, case: Case, number: int) -> "subprocess.Popen[str]":
    num_streams = len(range(number, case.num_streams, case.num_clients))
    flags = ["--client", stack.address, str(num_streams), str(case.stream_interval)]
    command = [sys.executable, "-m", "tests.load.bench_streams", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def _measure(stack: Stack, case: Case, clients: Sequence["subprocess.Popen[str]"], seconds: float) -> Figures:
    await asyncio.sleep(WARM_UP_S)
    processes = {name: psutil.Process(process.pid) for name, process in stack.processes.items()}
    processes |= {f"client-{i}": psutil.Process(client.pid) for i, client in enumerate(clients)}
    before, cpu_before, began_s = await stack.status(), _cpu_s(processes), time.monotonic()
    _tell(clients, "begin")
    await asyncio.sleep(seconds)
    after, cpu_after, took_s = await stack.status(), _cpu_s(processes), time.monotonic() - began_s
    _tell(clients, "end")
    reports = [await asyncio.to_thread(_hear, client) for client in clients]
    delays_s = np.concatenate([np.array(report["delays_s"]) for report in reports])
    weights = np.concatenate([np.array(report["counts"]) for report in reports])
    assert sum(w.num_running for w in after.workers) == case.num_streams, "the run was over too early"
    phases_s = [sum(sum(w.phase_s.values()) for w in status.workers) for status in (before, after)]
    return Figures(
        tokens_per_s=sum(report["num_tokens"] for report in reports) / took_s,
        messages_per_s=sum(report["num_messages"] for report in reports) / took_s,
        delay_p50_ms=1e3 * _percentile(delays_s, weights, 50),
        delay_p99_ms=1e3 * _percentile(delays_s, weights, 99),
        cores=_by_kind({name: (cpu_after[name] - cpu_before[name]) / took_s for name in processes}),
        engine_cores=(phases_s[1] - phases_s[0]) / took_s,
        delivery_cores=(after.delivery_s - before.delivery_s) / took_s,
    )


def _cpu_s(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


def _by_kind(cores: dict[str, float]) -> dict[str, float]:
    """Workers, and clients, as one."""
    kinds: dict[str, float] = {}
    for name, share in cores.items():
        kind = name.split("-")[0]
        kinds[kind] = kinds.get(kind, 0.0) + share
    return kinds


def _percentile(
    values: "np.typing.NDArray[np.float64]", weights: "np.typing.NDArray[np.int64]", percent: float
) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, percent / 100 * reached[-1])])


def _tell(clients: Sequence["subprocess.Popen[str]"], word: str) -> None:
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(f"{word}\n")
        client.stdin.flush()


def _hear(client: "subprocess.Popen[str]") -> dict:  # type: ignore[type-arg]
    assert client.stdout is not None
    return dict(json.loads(client.stdout.readline()))


# -- the client's process ---------------------------------------------------------------------------------------------


class Reader:
    """Reads streams; notes what comes between "begin" and "end"."""

    def __init__(self) -> None:
        self.is_noting = False
        self.times_s = array("d")
        self.counts = array("I")
        self.token_ids = array("H")

    async def read(self, client: PagodaClient, request: pb.GenerateRequest) -> None:
        async for delta in client.generate(request):
            if self.is_noting:
                self.times_s.append(time.monotonic())
                self.counts.append(len(delta.token_ids))
                self.token_ids.extend(delta.token_ids)

    def report(self) -> dict[str, object]:
        """Ages of tokens as a histogram over ticks of a tenth of a millisecond."""
        now_s = np.repeat(np.frombuffer(self.times_s), np.frombuffer(self.counts, np.uint32))
        token_ids = np.frombuffer(self.token_ids, np.uint16).astype(np.int64)
        assert ((token_ids >= FIRST_STAMP) & (token_ids < FIRST_STAMP + NUM_STAMPS)).all()
        edges_s = np.arange(0, WRAP_S + 1e-4, 1e-4)
        counts, _ = np.histogram(ages_s(token_ids, now_s), edges_s)
        filled = np.flatnonzero(counts)
        return {
            "num_tokens": len(token_ids),
            "num_messages": len(self.times_s),
            "delays_s": (edges_s[filled] + 5e-5).tolist(),
            "counts": counts[filled].tolist(),
        }


async def client_main(address: str, num_streams: int, stream_interval: int) -> None:
    """Reads all streams until standard input says "end"."""
    reader = Reader()
    async with PagodaClient(address) as client:
        prompts = (
            [FIRST_STAMP + (number * 7 + i) % 500 for i in range(PROMPT_TOKENS)] for number in range(num_streams)
        )
        max_tokens = MAX_MODEL_LEN - PROMPT_TOKENS
        requests = [greedy(prompt, max_tokens, stream_interval=stream_interval) for prompt in prompts]
        reading = [asyncio.create_task(reader.read(client, request)) for request in requests]
        for word in ("begin", "end"):
            assert await asyncio.to_thread(sys.stdin.readline) == f"{word}\n"
            reader.is_noting = word == "begin"
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        print(json.dumps(reader.report()), flush=True)
        await asyncio.to_thread(sys.stdin.readline)  # its processor time is read before it ends


# -- what is printed --------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """The demo model's tokenizer, with room for long sequences; its weights are never read."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_MODEL_LEN}))
    return model


def show(case: Case, f: Figures) -> str:
    """One line."""
    cores = " ".join(f"{f.cores.get(kind, 0.0):9.2f}" for kind in ("scheduler", "redis", "worker", "client"))
    return (
        f"{case.num_streams:7d} {case.num_workers:7d} {1e3 * case.step_s:7.2f} {case.asked_tokens_per_s:9.0f}"
        f" {f.tokens_per_s:9.0f} {f.messages_per_s:9.0f} {f.tokens_per_s / max(1e-9, f.messages_per_s):8.1f}"
        f" {f.delay_p50_ms:8.1f} {f.delay_p99_ms:8.1f} {cores} {f.engine_cores:7.2f} {f.delivery_cores:8.2f}"
    )


HEAD = (
    "streams workers step ms     asked  tokens/s messages/s each has delay p50 p99 ms   sched.     redis    worker"
    "    client  engine delivery\n(the last six in cores; engine and delivery are parts of the scheduler)"
)


async def bench(flags: argparse.Namespace) -> list[dict[str, object]]:
    """All cases, one after the other."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        print(machine_line())
        print(HEAD)
        for num_streams in flags.streams:
            for tokens_per_s in flags.tokens_per_s:
                step_s = num_streams / tokens_per_s
                case = Case(num_streams, step_s, flags.workers, flags.coalesce_ms / 1e3, flags.clients)
                figures = await run(case, model, flags.seconds)
                print(show(case, figures), flush=True)
                rows.append({"case": asdict(case), **asdict(figures)})
        print(machine_line())
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--tokens-per-s", type=float, nargs="+", default=[20_000, 50_000], help="asked of the workers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1, help="processes")
    parser.add_argument("--coalesce-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    if flags.client:
        address, num_streams, stream_interval = flags.client
        asyncio.run(client_main(address, int(num_streams), int(stream_interval)))
        return
    rows = asyncio.run(bench(flags))
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "rows": rows}
        flags.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
