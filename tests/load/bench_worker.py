"""`make bench-worker`: where a CPU worker's step goes: matrix products, attention, sampling, and all else.

One worker in this process runs decode steps of the "tiny" checkpoint (33.6M parameters), plans built by hand. "Else"
is what is left of a step without its native calls: Python, torch, the plan and the result. A step of decodes is one
native call; how that is shared out is measured in steps that make a call per operation. OMP_WAIT_POLICY=passive, as
a worker sets it, keeps torch's idle threads off the cores.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.cpu import CpuStep
from kernels.cpu.binding import NativeLibrary
from kernels.layers import UnfusedStep
from tests.load.random_llama import VOCAB_SIZE, make_model
from tests.unit.worker_harness import LocalWorker, Planner

PROMPT_LEN = 128
PARTS = {
    "linear": "products",
    "attend": "attention",
    "rotate_and_write": "rotary, KV write",
    "greedy": "sampling",
    "run_steps": "whole steps",
}
SHOWN = ("products", "attention", "rotary, KV write", "sampling")


@contextmanager
def call_per_operation() -> Iterator[None]:
    """Steps that begin within run their layers operation by operation."""
    layers, decode = CpuStep.run_layers, CpuStep.decode
    CpuStep.run_layers, CpuStep.decode = UnfusedStep.run_layers, UnfusedStep.decode  # type: ignore
    try:
        yield
    finally:
        CpuStep.run_layers, CpuStep.decode = layers, decode  # type: ignore[method-assign]


@contextmanager
def timed_native_calls() -> Iterator[dict[str, float]]:
    """Seconds spent in each of PARTS by libraries that are loaded within."""
    spent: dict[str, float] = defaultdict(float)
    load = NativeLibrary.__init__

    def timed(part: str, function: Callable[..., object]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            began = time.perf_counter()
            function(*arguments)
            spent[part] += time.perf_counter() - began

        return call

    def load_timed(self: NativeLibrary, path: Path) -> None:
        load(self, path)
        for name, part in PARTS.items():
            setattr(self, name, timed(part, getattr(self, name)))

    NativeLibrary.__init__ = load_timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        NativeLibrary.__init__ = load  # type: ignore[method-assign]


def measure(model: Path, dtype: str, num_seqs: int, num_steps: int) -> dict[str, float]:
    """Median seconds of a step, and of its parts."""
    num_blocks = num_seqs * (PROMPT_LEN + num_steps + 32) // 16
    flags: list[Any] = ["--model", model, "--dtype", dtype, "--num-blocks", num_blocks, "--max-num-seqs", num_seqs]
    flags += ["--max-num-batched-tokens", num_seqs * PROMPT_LEN, "--device", "cpu"]
    with timed_native_calls() as spent:
        worker, planner = LocalWorker(*map(str, flags)), Planner(16, num_blocks)
        for seq_id in range(1, num_seqs + 1):
            planner.add(seq_id, [random.randrange(2, VOCAB_SIZE) for _ in range(PROMPT_LEN)])
        planner.apply(worker.run(planner.plan(dict.fromkeys(planner.sequences, PROMPT_LEN))))
        steps = []
        for _ in range(num_steps):
            plan = planner.plan(dict.fromkeys(planner.sequences, 1))
            spent.clear()
            began = time.perf_counter()
            result = worker.run(plan)
            steps.append({"step": time.perf_counter() - began, **spent})
            planner.apply(result)
    return {part: statistics.median(step[part] for step in steps) for part in steps[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    flags = parser.parse_args(arguments)
    sys.stdout.write(" | ".join(["dtype", "sequences", "ms per step", *SHOWN, "else"]) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("tiny", Path(folder) / "tiny")
        for dtype in ("bfloat16", "float32"):
            for num_seqs in (1, 8, 64):
                whole = measure(model, dtype, num_seqs, flags.steps)
                with call_per_operation():
                    apart = measure(model, dtype, num_seqs, flags.steps)
                step_s = whole.pop("step")
                native_s = sum(whole.values())
                scale = native_s / sum(apart[part] for part in SHOWN) / step_s
                shares = [f"{100 * scale * apart[part]:.1f} %" for part in SHOWN]
                shares.append(f"{100 * (1 - native_s / step_s):.1f} %")
                sys.stdout.write(" | ".join([dtype, str(num_seqs), f"{1e3 * step_s:.1f}", *shares]) + "\n")


if __name__ == "__main__":
    main()
