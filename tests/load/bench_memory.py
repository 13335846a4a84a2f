"""`make bench-memory`: KV memory wasted and tokens per second, paged beside dense, in one run over the same requests.

All contenders share out the same pool: as many blocks as hold NUM_DENSE sequences of max_model_len. They use the same
planner (but for what it reserves), worker, kernels and model, in one process without gRPC and Redis. All requests wait
at the start; outputs are greedy and as long as the trace says. Every step counts by the time that it took. Contenders
take turns: who has made the fewest tokens goes on for a while, so that a machine that others slow down slows all alike.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from scheduler.admitter import PlannerLimits
from tests.load.memory.contenders import CONTENDERS, PAGED, PAGED_UNKNOWING
from tests.load.memory.drive import Drive, Request, local_worker
from tests.load.memory.outcome import Outcome
from tests.load.memory.report import judge, show, show_savings
from tests.load.memory.sharing import VOCAB_SIZE, cases
from tests.load.memory.traces import MAX_MODEL_LEN, SPECS, Lengths, read_trace
from tests.stack import ROOT
from tests.unit.worker_harness import LocalWorker

NUM_DENSE = 4
BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
NUM_BLOCKS = NUM_DENSE * MAX_MODEL_LEN // BLOCK_SIZE
LIMITS = PlannerLimits(BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, overcommit=1.0)
TURN_S = 0.25


def load(model: Path) -> LocalWorker:
    """A warm worker with a pool of its own."""
    worker = local_worker(
        {
            "model": model,
            "max-model-len": MAX_MODEL_LEN,
            "block-size": BLOCK_SIZE,
            "num-blocks": NUM_BLOCKS,
            "max-num-seqs": MAX_NUM_SEQS,
            "max-num-batched-tokens": MAX_NUM_BATCHED_TOKENS,
        }
    )
    warm_up = requests([Lengths(64, 8)] * 8, seed=0, limit=None)
    list(Drive(CONTENDERS[PAGED](LIMITS, NUM_BLOCKS), worker, warm_up))
    return worker


def requests(trace: Sequence[Lengths], seed: int, limit: int | None) -> list[Request]:
    """With random prompts. limit: tokens of prompt and output that each client allows; None: just what it gets."""
    rng = random.Random(seed)
    found = []
    for lengths in trace:
        prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(lengths.num_prompt_tokens)]
        allowed = lengths.num_output_tokens if limit is None else limit - len(prompt)
        found.append(Request(prompt, lengths.num_output_tokens, allowed))
    return found


def race(workers: Mapping[str, LocalWorker], trace: Sequence[Lengths], seed: int) -> dict[str, Outcome]:
    """Every contender once, in turns."""
    drives = {}
    for name, make in CONTENDERS.items():
        limit = MAX_MODEL_LEN if name == PAGED_UNKNOWING else None
        drives[name] = Drive(make(LIMITS, NUM_BLOCKS), workers[name], requests(trace, seed, limit))
    outcomes = {name: Outcome() for name in drives}
    moments = {name: iter(drive) for name, drive in drives.items()}
    while moments:
        name = min(moments, key=lambda name: outcomes[name].num_output_tokens)
        turn_ends_s = outcomes[name].seconds + TURN_S
        for moment in moments[name]:
            outcomes[name].add(moment)
            if outcomes[name].seconds > turn_ends_s:
                break
        else:
            del moments[name]
    for name, drive in drives.items():
        outcomes[name].num_preemptions = drive.num_preemptions
        num_equal = sum(a == b for a, b in zip(drive.outputs, drives[PAGED].outputs, strict=True))
        sys.stderr.write(
            f"{name}: {outcomes[name].tokens_per_s:.0f} tokens/s in {outcomes[name].seconds:.0f} s, "
            f"{drive.num_preemptions} preemptions, {num_equal} of {len(trace)} outputs as of {PAGED}\n"
        )
    return outcomes


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "deploy/demo/model")
    parser.add_argument("--traces", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--num-requests", type=int, help="only the first of each trace")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args(arguments)
    workers = {name: load(flags.model) for name in CONTENDERS}
    lines: list[str] = []
    goals: list[str] = []
    figures = {}
    for trace_name in flags.traces:
        sys.stderr.write(f"{trace_name}\n")
        trace = read_trace(trace_name)[: flags.num_requests]
        rounds = [race(workers, trace, seed) for seed in range(flags.rounds)]
        runs = {name: [outcomes[name] for outcomes in rounds] for name in CONTENDERS}
        figures[trace_name] = {name: [asdict(outcome) for outcome in runs[name]] for name in runs}
        lines += [*show(trace_name, runs), ""]
        goals += judge(trace_name, runs)
    savings = list(cases(flags.model))
    num_bytes = NUM_BLOCKS * workers[PAGED].description.pool.block_bytes
    sys.stdout.write(f"{NUM_BLOCKS} blocks of {BLOCK_SIZE} tokens, {num_bytes / 2**20:.0f} MiB of KV for each\n\n")
    sys.stdout.write("\n".join([*lines, *goals, "", *show_savings(savings)]) + "\n")
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine()}
        about |= {"kv_bytes": num_bytes, "block_size": BLOCK_SIZE}
        found = about | {"runs": figures, "sharing": [asdict(saving) for saving in savings]}
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
