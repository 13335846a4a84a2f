"""`make bench-kernels`: CPU kernels against a streaming read of memory and against torch, in one process.

Every round measures all candidates of a case one after the other; what is printed and kept are medians over rounds, so
that a busy moment of the machine hits all alike. Decode is judged by the bytes of KV per second, prefill by time,
matrix products by operations per second, and of few rows by the bytes of weights per second.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kernels import AttentionMetadata, AttentionShape, LayerKV
from kernels.cpu import CpuKernels
from kernels.cpu.memory import empty_on_huge_pages
from kernels.cpu.targets import runnable_targets

BLOCK_SIZE = 16
PAGE_BYTES = 4096
# Of all matrices of a product's case: far above the caches.
MATRICES_BYTES = 100 * 10**6
Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """num_seqs sequences of context_len KV tokens, the last query_len of them queries."""

    dtype: torch.dtype
    num_seqs: int
    context_len: int
    query_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        dtype = str(self.kv_dtype or self.dtype).removeprefix("torch.")
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        return f"{dtype:8} {heads:20} {self.num_seqs} x {self.context_len}"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            *(self.num_heads, self.num_kv_heads, self.head_dim, BLOCK_SIZE, self.head_dim**-0.5),
            *(self.dtype, self.kv_dtype or self.dtype),
        )


class Pool:
    """A layer's KV of random numbers, and a step that reads it through a block table."""

    def __init__(self, case: Case, shuffled: bool = True) -> None:
        self.case = case
        self.kernels = CpuKernels(case.shape)
        num_blocks = case.num_seqs * -(-case.context_len // BLOCK_SIZE)
        ids = torch.randperm(num_blocks) if shuffled else torch.arange(num_blocks)
        self.tables = ids.view(case.num_seqs, -1).to(torch.int32)
        self.query = torch.randn(case.num_seqs * case.query_len, case.num_heads, case.head_dim).to(case.dtype)
        kv_format = self.kernels.kv_format
        self.blocks = empty_on_huge_pages((2, num_blocks, case.num_kv_heads, kv_format.head_bytes), torch.uint8)
        self.layer = LayerKV(self.blocks[0], self.blocks[1])
        for plane, write in ((self.layer.keys, kv_format.write_keys), (self.layer.values, kv_format.write_values)):
            for block in plane:
                write(block, (), torch.randn(case.num_kv_heads, BLOCK_SIZE, case.head_dim))

    @functools.cached_property
    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the order that torch reads: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] of the dtype."""
        kv_format, dtype = self.kernels.kv_format, self.case.dtype
        return kv_format.read_keys(self.layer.keys).to(dtype), kv_format.read_values(self.layer.values).to(dtype)

    def metadata(self) -> AttentionMetadata:
        """The slot mapping is not used: nothing is written."""
        case = self.case
        context_lens = np.full(case.num_seqs, case.context_len, np.int64)
        query_lens = np.full(case.num_seqs, case.query_len, np.int64)
        return AttentionMetadata(
            block_tables=self.tables,
            context_lens=torch.from_numpy(context_lens.astype(np.int32)),
            cu_seqlens_q=torch.arange(0, case.num_seqs * case.query_len + 1, case.query_len, dtype=torch.int32),
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            host_block_tables=self.tables.numpy(),
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

    def attend(self) -> Callable[[], torch.Tensor]:
        step = self.kernels.prepare(self.metadata())
        return lambda: step.attend(self.query, self.layer, 0)

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values made contiguous: [num_seqs, num_kv_heads, context_len, head_dim]."""
        case = self.case

        def gather(blocks: torch.Tensor) -> torch.Tensor:
            rows = blocks.index_select(0, self.tables.reshape(-1)).view(case.num_seqs, -1, *blocks.shape[1:])
            return rows.transpose(1, 2).reshape(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

        keys, values = self.plain
        return gather(keys), gather(values)


def torch_decodes(pool: Pool) -> Candidates:
    """Gather, then attend in each of the ways that torch offers; a group's heads are seen as query tokens, for
    enable_gqa is several times slower."""
    case = pool.case
    query = pool.query.view(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

    def with_sdpa() -> torch.Tensor:
        keys, values = pool.gathered()
        return F.scaled_dot_product_attention(query, keys, values)

    def with_matmul() -> torch.Tensor:
        keys, values = pool.gathered()
        return (query @ keys.transpose(-1, -2) * case.shape.scale).softmax(dim=-1) @ values

    return {"torch gather + SDPA": with_sdpa, "torch gather + matmul": with_matmul}


def torch_prefills(pool: Pool) -> Candidates:
    """SDPA over KV that is contiguous already."""
    case = pool.case
    keys, values = pool.gathered()
    group_size = case.num_heads // case.num_kv_heads
    repeated_keys, repeated_values = (x.repeat_interleave(group_size, dim=1) for x in (keys, values))
    query = pool.query.view(case.num_seqs, case.query_len, case.num_heads, case.head_dim).transpose(1, 2)
    return {
        "torch SDPA, heads repeated": lambda: F.scaled_dot_product_attention(
            query, repeated_keys, repeated_values, is_causal=True
        ),
        "torch SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        ),
    }


def medians(candidates: Candidates, rounds: int) -> dict[str, float]:
    """Seconds per call of each, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_decode(case: Case, rounds: int) -> dict[str, object]:
    """GB/s of KV, beside GB/s of a streaming read of the same memory."""
    pool = Pool(case)
    address, stream_bytes = pool.blocks.data_ptr(), pool.blocks.nbytes // PAGE_BYTES * PAGE_BYTES
    num_threads = torch.get_num_threads()
    found = medians(
        {
            "stream": lambda: pool.kernels.native.stream_read(address, stream_bytes, num_threads),
            "pagoda": pool.attend(),
            **torch_decodes(pool),
        },
        rounds,
    )
    speeds = {name: pool.blocks.nbytes / seconds / 1e9 for name, seconds in found.items()}
    best_torch = max(speed for name, speed in speeds.items() if name.startswith("torch"))
    share = speeds["pagoda"] / speeds["stream"]
    report(
        f"{case.name:46} stream {speeds['stream']:5.1f}  pagoda {speeds['pagoda']:5.1f} GB/s = {share:4.0%} of it, "
        f"{speeds['pagoda'] / best_torch:4.1f} x torch ({best_torch:.1f})"
    )
    return {**row(case), "GB/s": speeds, "share_of_stream": share, "times_torch": speeds["pagoda"] / best_torch}


def bench_8_bit(case: Case, rounds: int) -> dict[str, object]:
    """Decode over the same tokens as they are, as fp8 and as int8."""
    kv_dtypes = (case.dtype, torch.float8_e4m3fn, torch.int8)
    pools = {str(kv_dtype): Pool(replace(case, kv_dtype=kv_dtype)) for kv_dtype in kv_dtypes}
    found = medians({name: pool.attend() for name, pool in pools.items()}, rounds)
    ratios = {name: found[name] / found[str(case.dtype)] for name in found}
    listed = ", ".join(f"{name.removeprefix('torch.')} {ratio:.2f} x" for name, ratio in ratios.items())
    report(f"{case.name:46} {listed} the time")
    return {**row(case), "seconds": found, "times_own": ratios}


def bench_indirection(case: Case, rounds: int) -> dict[str, object]:
    """The same kernel over a shuffled table, an ordered one, and KV that is contiguous per sequence and head."""
    ordered = Pool(case, shuffled=False)
    apart = replace(
        case,
        num_seqs=case.num_seqs * case.num_kv_heads,
        num_heads=case.num_heads // case.num_kv_heads,
        num_kv_heads=1,
    )
    contiguous = Pool(apart, shuffled=False)
    found = medians(
        {"shuffled": Pool(case).attend(), "ordered": ordered.attend(), "contiguous": contiguous.attend()}, rounds
    )
    speeds = {name: ordered.blocks.nbytes / seconds / 1e9 for name, seconds in found.items()}
    metadata = ordered.metadata()
    tensors = (metadata.block_tables, metadata.context_lens, metadata.cu_seqlens_q)
    share = sum(x.numel() * x.element_size() for x in tensors) / ordered.blocks.nbytes
    listed = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    report(f"{case.name:46} {listed} GB/s; {share:.1e} bytes of metadata per byte of one layer's KV")
    return {**row(case), "GB/s": speeds, "metadata_bytes_per_kv_byte": share}


def bench_shared_prefix(case: Case, prefix_len: int, rounds: int) -> dict[str, object]:
    """Decodes whose tables begin with the same blocks, beside the same decodes with blocks of their own."""
    own, shared = Pool(case), Pool(case)
    shared.tables[:, : prefix_len // BLOCK_SIZE] = shared.tables[0, : prefix_len // BLOCK_SIZE]
    found = medians({"own": own.attend(), "shared": shared.attend()}, rounds)
    ratio = found["own"] / found["shared"]
    report(f"{case.name:46} own {found['own'] * 1e3:6.2f} ms, shared {found['shared'] * 1e3:6.2f} ms: {ratio:.1f} x")
    return {**row(case), "prefix_len": prefix_len, "seconds": found, "times_own": ratio}


def bench_product(dtype: torch.dtype, num_outputs: int, num_inputs: int, rounds: int) -> dict[str, object]:
    """Products of 1, 16, 64 and 512 rows with matrices that come from memory, not from the caches."""
    weight_bytes = num_outputs * num_inputs * dtype.itemsize
    weights = torch.randn(max(1, MATRICES_BYTES // weight_bytes), num_outputs, num_inputs).to(dtype)
    kernels = CpuKernels(AttentionShape(1, 1, 64, BLOCK_SIZE, 1.0, dtype, dtype))
    packed = [kernels.linear(weight, None) for weight in weights]
    stream = empty_on_huge_pages((len(weights) * weight_bytes // PAGE_BYTES * PAGE_BYTES,), torch.uint8).fill_(1)
    num_threads, figures = torch.get_num_threads(), {}
    for num_rows in (1, 16, 64, 512):
        x, total = torch.randn(num_rows, num_inputs).to(dtype), torch.zeros(num_rows, num_outputs, dtype=dtype)

        def with_pagoda(x: torch.Tensor = x, total: torch.Tensor = total) -> None:
            for linear in packed:
                linear.add(x, total)

        def with_torch(x: torch.Tensor = x) -> None:
            for weight in weights:
                F.linear(x, weight)

        found = medians(
            {
                "stream": lambda: kernels.native.stream_read(stream.data_ptr(), stream.numel(), num_threads),
                "pagoda": with_pagoda,
                "torch": with_torch,
            },
            rounds if num_rows < 64 else max(1, rounds // 3),
        )
        operations = 2e-9 * num_rows * weights.numel()
        figures[num_rows] = {name: operations / found[name] for name in ("pagoda", "torch")}
        figures[num_rows]["share_of_stream"] = found["stream"] / found["pagoda"]
    listed = "; ".join(f"{n} rows {x['pagoda']:3.0f} GFLOP/s, torch {x['torch']:3.0f}" for n, x in figures.items())
    name = f"{str(dtype).removeprefix('torch.'):8} {num_inputs} -> {num_outputs}"
    shares = ", ".join(f"{figures[n]['share_of_stream']:.0%}" for n in (1, 16))
    report(f"{name:46} {listed}; 1 row and 16 read at {shares} of the stream")
    return {"dtype": str(dtype), "num_inputs": num_inputs, "num_outputs": num_outputs, "GFLOP/s": figures}


def bench_prefill(case: Case, rounds: int) -> dict[str, object]:
    """Time beside that of torch over contiguous KV."""
    pool = Pool(case)
    found = medians({"pagoda": pool.attend(), **torch_prefills(pool)}, rounds)
    best_torch = min(seconds for name, seconds in found.items() if name.startswith("torch"))
    ratio = found["pagoda"] / best_torch
    report(f"{case.name:46} pagoda {found['pagoda'] * 1e3:6.1f} ms, torch {best_torch * 1e3:6.1f} ms: {ratio:.2f} x")
    return {**row(case), "seconds": found, "times_of_torch": ratio}


def row(case: Case) -> dict[str, object]:
    return {**asdict(case), "dtype": str(case.dtype), "kv_dtype": str(case.kv_dtype or case.dtype)}


def report(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def hardware() -> dict[str, object]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": runnable_targets()[0].name,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def decode_cases(megabytes: int) -> list[Case]:
    """Groups of 1, 2, 4 and 8 query heads, with `megabytes` of KV each."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for group_size, num_kv_heads, head_dim in ((1, 8, 128), (2, 8, 128), (4, 8, 128), (8, 8, 128), (4, 8, 64)):
            token_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
            context_len = megabytes * 10**6 // token_bytes // 8 // BLOCK_SIZE * BLOCK_SIZE
            cases.append(Case(dtype, 8, context_len, 1, group_size * num_kv_heads, num_kv_heads, head_dim))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=256, help="of KV per decode case; far above the caches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where the raw results go")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    results: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }
    report(json.dumps(results["hardware"]))
    cases = decode_cases(flags.megabytes)
    report("decode")
    results["decode"] = [bench_decode(case, flags.rounds) for case in cases]
    report("8-bit KV, in decode")
    results["8_bit"] = [bench_8_bit(case, flags.rounds) for case in cases[:5]]
    report("what the block table costs, in decode")
    results["indirection"] = [bench_indirection(case, flags.rounds) for case in cases[::4]]
    report("prefill of 1,024 tokens, causal")
    results["prefill"] = [
        bench_prefill(Case(dtype, 1, 1024, 1024, num_heads, 8, 128), flags.rounds)
        for dtype in (torch.bfloat16, torch.float32)
        for num_heads in (8, 32)
    ]
    report("decode of 64 sequences that share a prefix of 1,024 tokens")
    results["shared_prefix"] = [
        bench_shared_prefix(Case(dtype, 64, 1083, 1, 8, 4, 64), 1024, flags.rounds)  # the last block is seldom full
        for dtype in (torch.bfloat16, torch.float32)
    ]
    report("matrix products")
    results["products"] = [
        bench_product(dtype, num_outputs, num_inputs, flags.rounds)
        for dtype in (torch.bfloat16, torch.float32)
        for num_outputs, num_inputs in ((1024, 512), (3072, 512), (512, 1536), (4096, 4096))
    ]
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
