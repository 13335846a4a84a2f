"""`make bench-cuda`: CUDA kernels against a copy of memory on the same GPU, and against FlashInfer, where that is
installed, and torch, in one process.

A case is attended to layer after layer, as a step does, and its layers together hold far more KV than the caches; what
is timed is a CUDA graph of that. Whoever is timed has to agree with the reference first. Every round replays the graphs
of all candidates of a case, one after the other; what is printed and kept are medians over rounds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch

from kernels.bench_report import begin, report, row, times_of
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.bench_layers import Case, Layers, Run
from kernels.cuda.select import cuda_backend
from kernels.cuda.variant import EIGHT_BIT_ELEMENTS

# Of a GPU, some 1 ms: as long as it takes to put a graph of a thousand launches into its queue.
BUSY_CYCLES = 2_000_000
NOBODY: Mapping[str, Run] = MappingProxyType({})


class Clock(Protocol):
    """How long a device takes."""

    def record(self, run: Run) -> Callable[[], float]:
        """What does the same as `run`, and says how many seconds it took."""


class GraphClock:
    """See Clock. Replays of a CUDA graph, by the device's own events."""

    def record(self, run: Run) -> Callable[[], float]:
        """See Clock."""
        run()  # compiles and uploads what is no part of the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def seconds() -> float:
            # The start is noted when the graph is in the queue behind it.
            torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return seconds


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how long. num_bytes: of KV that a case's layers have together."""

    device: torch.device
    backend: Backend
    clock: Clock
    num_bytes: int
    rounds: int

    def decode(self, case: Case) -> dict[str, object]:
        """GB/s of KV beside those of a copy, which reads half of its bytes and writes half."""
        layers = self.layers(case)
        source, target = torch.ones((2, self.num_bytes // 2), dtype=torch.uint8, device=self.device)
        ours = {"copy": lambda: target.copy_(source), "pagoda": layers.attend()}
        found = self.medians(ours, layers.peers())
        num_bytes = layers.kv_bytes * layers.num_layers
        speeds = {name: (self.num_bytes if name == "copy" else num_bytes) / s / 1e9 for name, s in found.items()}
        share = speeds["pagoda"] / speeds["copy"]
        microseconds = found["pagoda"] / layers.num_layers * 1e6
        beside = "".join(f", {name} {speed:.0f}" for name, speed in speeds.items() if name not in ("copy", "pagoda"))
        report(
            f"{label(case)} {layers.kv_bytes / 1e6:7.1f} MB a layer, {microseconds:7.1f} us: pagoda"
            f" {speeds['pagoda']:5.0f} GB/s = {share:4.0%} of a copy's {speeds['copy']:.0f}{beside}"
        )
        return {**row(case), "kv_bytes": layers.kv_bytes, "us": microseconds, "GB/s": speeds, "share_of_copy": share}

    def eight_bit(self, case: Case, kv_dtypes: Sequence[torch.dtype] = tuple(EIGHT_BIT_ELEMENTS)) -> dict[str, object]:
        """The same tokens in `kv_dtypes`: time of each beside that of the case's own dtype."""
        dtypes = (case.dtype, *kv_dtypes)
        candidates = {str(kv_dtype): self.layers(replace(case, kv_dtype=kv_dtype)) for kv_dtype in dtypes}
        found = self.medians({name: layers.attend() for name, layers in candidates.items()})
        times = {name: found[name] / layers.num_layers for name, layers in candidates.items()}
        ratios, listed = times_of(str(case.dtype), times)
        report(f"{label(case)} {listed} the time")
        return {**row(case), "seconds": times, "times_own": ratios}

    def indirection(self, case: Case) -> dict[str, object]:
        """The same kernel over a shuffled table, an ordered one, and KV that is contiguous per sequence and head."""
        apart = replace(case, context_lens=case.context_lens * case.num_kv_heads, num_kv_heads=1)
        candidates = {
            "shuffled": self.layers(case),
            "ordered": self.layers(case, is_shuffled=False),
            "contiguous": self.layers(apart, is_shuffled=False),
        }
        found = self.medians({name: layers.attend() for name, layers in candidates.items()})
        speeds = {name: x.kv_bytes * x.num_layers / found[name] / 1e9 for name, x in candidates.items()}
        report(f"{label(case)} {', '.join(f'{name} {speed:.0f}' for name, speed in speeds.items())} GB/s")
        return {**row(case), "GB/s": speeds}

    def shared_prefix(self, case: Case) -> dict[str, object]:
        """Decodes whose tables begin with the same blocks, beside the same with blocks of their own."""
        candidates = {"own": self.layers(replace(case, prefix_len=0)), "shared": self.layers(case)}
        found = self.medians({name: layers.attend() for name, layers in candidates.items()})
        ratio = found["own"] / found["shared"]
        report(f"{label(case)} {ratio:.1f} x as fast where {case.prefix_len} tokens are shared")
        return {**row(case), "seconds": found, "times_own": ratio}

    def prefill(self, case: Case) -> dict[str, object]:
        """TFLOP/s of prompts, in one layer: what they read is little beside what they compute."""
        layers = Layers(case, self.kernels(case), num_bytes=0)
        is_whole = {case.query_len} == set(case.context_lens)  # torch's causal mask fits no other
        peers = {**layers.peers(), **(layers.torch_prefills() if is_whole else {})}
        found = self.medians({"pagoda": layers.attend()}, peers)
        speeds = {name: case.flop * layers.num_layers / seconds / 1e12 for name, seconds in found.items()}
        report(f"{label(case)} {', '.join(f'{name} {speed:.0f}' for name, speed in speeds.items())} TFLOP/s")
        return {**row(case), "TFLOP/s": speeds}

    def layers(self, case: Case, is_shuffled: bool = True) -> Layers:
        """As many as have `num_bytes`."""
        return Layers(case, self.kernels(case), self.num_bytes, is_shuffled)

    def kernels(self, case: Case) -> CudaKernels:
        """Those that a worker would have."""
        return CudaKernels(self.device, case.shape, self.backend, Tuning())

    def medians(self, candidates: Mapping[str, Run], peers: Mapping[str, Run] = NOBODY) -> dict[str, float]:
        """Seconds of each, after a round that is not counted; of peers, of those whose graph can be recorded."""
        timed = {name: self.clock.record(run) for name, run in candidates.items()}
        for name, run in peers.items():
            try:
                timed[name] = self.clock.record(run)
            except RuntimeError as error:
                sys.stderr.write(f"without {name}: {error}\n")
        rounds = [{name: seconds() for name, seconds in timed.items()} for _ in range(self.rounds + 1)][1:]
        return {name: statistics.median(times[name] for times in rounds) for name in timed}


def label(case: Case) -> str:
    return f"{case.name:28} {case.group_size * case.num_kv_heads:2}/{case.num_kv_heads} heads of {case.head_dim}:"


def hardware(device: torch.device) -> dict[str, object]:
    """Of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


# Half a gigabyte of KV in a layer, for each size of group.
EVEN = tuple(
    Case("32 x 4k", (4096,) * 32, group_size, num_kv_heads, head_dim)
    for group_size, num_kv_heads, head_dim in ((1, 8, 128), (2, 8, 128), (4, 8, 128), (8, 8, 128), (8, 16, 64))
)
SKEWED = (
    Case("1 x 16k + 15 x 64", (16384, *(64,) * 15)),
    Case("1 x 64k + 31 x 4k", (65536, *(4096,) * 31)),
    Case("32 x 128 + 32 x 4k", (128, 4096) * 32),
)
SINGLE = tuple(Case(f"1 x {length // 1024}k", (length,)) for length in (1024, 2048, 4096))
PREFIX = Case("64 x 4k, of one prefix", (4224,) * 64, prefix_len=4096)
PROMPTS = (
    Case("4 x 4k prompts", (4096,) * 4, query_len=4096),
    Case("chunks of 512 at 4k", (4096,) * 16, query_len=512),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.cuda.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of KV per case; far above the caches")
    parser.add_argument("--json", type=Path, help="where the raw results go")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing to measure\n")
        return 1
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, cuda_backend(device), GraphClock(), int(flags.gigabytes * 1e9), flags.rounds)
    results = begin(hardware(device))
    for name, measure, cases in (
        ("decode", bench.decode, (*EVEN, *SKEWED, *SINGLE)),
        ("8_bit", bench.eight_bit, EVEN),
        ("indirection", bench.indirection, EVEN[2:3]),
        ("shared_prefix", bench.shared_prefix, (PREFIX,)),
        ("prefill", bench.prefill, PROMPTS),
    ):
        report(name)
        rows: list[object] = []
        results[name] = rows
        for case in cases:
            rows.append(measure(case))
            if flags.json:  # what was found is kept, whatever comes next
                flags.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
