"""`make bench-peers`: ours and OpenAI servers under the very same arrivals, streaming every token, in one run.

The load comes from `pagoda load`'s harness: over gRPC to ours (`pagoda up`), over HTTP to a peer. All hold the same
random checkpoint in bf16 and take turns, workload by workload; who is not asked is idle. Figures are medians over
rounds, each with prompts of its own. W1: 64 requests of 128 + 128 tokens at once. W2: 64 that share a prefix of 1,024
tokens + 32 + 64. W3: 64 ragged. W4: one of 128 + 128.

Peers: --peer vllm=PYTHON, llama.cpp=SOURCE, transformers=PYTHON, whose servers are started here (see peer_servers.py);
--peer NAME=URL, an OpenAI server that runs already and serves the checkpoint by itself (--keep-model says where it is).
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.load.bench_engines import pagoda_up, workloads
from tests.load.bench_step import machine_line
from tests.load.harness.backend import connect
from tests.load.harness.figures import summary
from tests.load.harness.machine import describe_machine
from tests.load.harness.run import Interrupt, run_once
from tests.load.harness.settings import Dataset, Measures, Pace, Settings, Target
from tests.load.peer_servers import peer_server
from tests.load.random_llama import VOCAB_SIZE, make_model
from tests.load.words_tokenizer import write_words_tokenizer

NUM_REQUESTS = 64
OURS = "pagoda"


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
    asked = workloads(seed)[label]
    expected = sum(map(len, asked.prompts)), sum(asked.max_tokens)
    got = found["total_input_tokens"], found["total_output_tokens"]
    assert got == expected, f"tokens in and out: {got}, asked for {expected}"
    names = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms")
    return Run(*(float(str(found[name])) for name in names))


async def bench(flags: argparse.Namespace, model: Path) -> dict[str, dict[str, list[Run]]]:
    """Runs by engine and workload."""
    runs: dict[str, dict[str, list[Run]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        for given in flags.peer:
            targets[given.partition("=")[0]] = await stack.enter_async_context(peer_server(given, model))
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
    parser.add_argument("--peer", action="append", default=[], help="vllm=PYTHON, llama.cpp=SOURCE, NAME=URL ...")
    parser.add_argument("--checkpoint", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--keep-model", type=Path, help="make the checkpoint here, and leave it")
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(flags.checkpoint, (flags.keep_model or Path(folder)) / flags.checkpoint)
        write_words_tokenizer(model, VOCAB_SIZE)
        runs = asyncio.run(bench(flags, model))
    print("\n".join(show(runs)))
    print(machine_line())
    if flags.json:
        figures = {name: {label: [vars(r) for r in found] for label, found in by.items()} for name, by in runs.items()}
        about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "checkpoint": flags.checkpoint}
        flags.json.write_text(json.dumps(about | {"runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
