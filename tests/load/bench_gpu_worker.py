"""`make bench-gpu-worker`: a GPU worker's decode step, queued and replayed, one by one, and launched kernel by kernel.

One worker in this process runs decode steps of a random checkpoint. All plans are there from the start, as where the
scheduler is never late. Beside them stands what reading the weights and the KV once takes, at the speed of a copy of
memory on the same device. Steps are timed from result to result.
"""

import argparse
import contextlib
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pagoda.v1 import worker_pb2 as pb
from safetensors import safe_open

from kernels.bench_report import begin, report
from tests.load.random_llama import CHECKPOINTS, VOCAB_SIZE, make_model
from tests.unit.queued_steps import PlannerAhead, Script
from worker.assemble import Assembly, assemble
from worker.batch import Batch
from worker.config import parse_config
from worker.executor import Executor
from worker.ledger import Order
from worker.swaps import NoSwaps
from worker.wire import StepOutput

BLOCK_SIZE = 16
COPIED_BYTES = 2**30
# Of the steps, those first ones that are not counted.
WARM_UP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """prompt_len: tokens of context before the first decode."""

    num_seqs: int
    prompt_len: int
    num_steps: int

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * (-(-(self.prompt_len + self.num_steps) // BLOCK_SIZE) + 1)

    @property
    def mean_context_len(self) -> float:
        return self.prompt_len + self.num_steps / 2


class TimedScript(Script):
    """Notes when each result is there."""

    def __init__(self, plans: Sequence[pb.StepPlan], is_queued: bool) -> None:
        super().__init__(plans, lambda: is_queued)
        self.times: list[float] = []

    def finish(self, order: Order, output: StepOutput) -> None:
        super().finish(order, output)
        self.times.append(time.perf_counter())


def make_plans(case: Case) -> list[pb.StepPlan]:
    """A prompt at a time, then decodes of all."""
    planner, rng = PlannerAhead(BLOCK_SIZE, case.num_blocks), random.Random(1)
    plans = []
    for seq_id in range(1, case.num_seqs + 1):
        planner.add(seq_id, [rng.randrange(2, VOCAB_SIZE) for _ in range(case.prompt_len)])
        plans.append(planner.plan({seq_id: case.prompt_len}))
    return plans + [planner.plan(dict.fromkeys(planner.sequences, 1)) for _ in range(case.num_steps)]


def step_s(assembly: Assembly, case: Case, is_queued: bool) -> float:
    """Median of the decode steps."""
    script = TimedScript(make_plans(case), is_queued)
    with contextlib.suppress(Script.Done):
        Executor(script, Batch(assembly.limits), assembly.runner, NoSwaps()).run()
    times = script.times[case.num_seqs + int(WARM_UP_SHARE * case.num_steps) :]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written, together."""
    source, target = torch.ones((2, COPIED_BYTES // 2), dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - began) / 4)
    return COPIED_BYTES / statistics.median(seconds)


def num_weights(model: Path) -> int:
    """Of all matrices that a step reads whole: not of the embedding."""
    with safe_open(model / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return sum(math.prod(shape) for name, shape in shapes.items() if "embed_tokens" not in name)


def measure(model: Path, device: str, dtype: str, case: Case) -> tuple[dict[str, float], float]:
    """Seconds of a step, and bytes that it must read."""
    flags = ["--model", str(model), "--scheduler", "unix:none", "--dtype", dtype, "--device", device]
    flags += ["--num-blocks", str(case.num_blocks), "--max-num-seqs", str(case.num_seqs)]
    flags += ["--max-num-batched-tokens", str(max(case.prompt_len, case.num_seqs))]
    found, num_bytes = {}, 0.0
    for name, more in (("graphs", ()), ("eager", ("--enforce-eager",))):
        assembly = assemble(parse_config([*flags, *more]))
        kv_bytes = case.num_seqs * case.mean_context_len * assembly.description.pool.block_bytes / BLOCK_SIZE
        num_bytes = kv_bytes + num_weights(model) * (4 if dtype == "float32" else 2)
        found[f"{name}, queued"] = step_s(assembly, case, is_queued=True)
        found[f"{name}, one by one"] = step_s(assembly, case, is_queued=False)
    return found, num_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="small")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="where the raw results go")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure")
    name = torch.cuda.get_device_name() if flags.device == "cuda" else flags.device
    results = begin({"device": name, "torch": torch.__version__, "checkpoint": flags.checkpoint, "dtype": flags.dtype})
    copied = copy_bytes_per_s(torch.device(flags.device))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(flags.checkpoint, Path(folder) / "model")
        for num_seqs in flags.num_seqs:
            case = Case(num_seqs, flags.prompt_len, flags.steps)
            seconds, num_bytes = measure(model, flags.device, flags.dtype, case)
            seconds["reading"] = num_bytes / copied
            listed = ", ".join(f"{part} {1e3 * s:.3f}" for part, s in seconds.items())
            report(f"{num_seqs} sequences of {flags.prompt_len} tokens and more, ms per step: {listed}")
            rows.append({**asdict(case), "seconds": seconds})
    if flags.json:
        flags.json.write_text(json.dumps({**results, "steps": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
