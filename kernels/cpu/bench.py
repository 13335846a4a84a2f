"""`make bench-kernels`: CPU kernels against a streaming read of memory and against torch, in one process.

Every round measures all candidates of a case one after the other; what is printed and kept are medians over rounds, so
that a busy moment of the machine hits all alike. Decode is judged by the bytes of KV per second, prefill by time,
matrix products by operations per second, and of few rows by the bytes of weights per second.
"""

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import AttentionShape, Norm
from kernels.bench_report import begin, report, row, times_of
from kernels.cpu import CpuKernels
from kernels.cpu.bench_pool import BLOCK_SIZE, Candidates, Case, Pool, torch_decodes, torch_prefills
from kernels.cpu.memory import empty_on_huge_pages
from kernels.cpu.targets import runnable_targets

PAGE_BYTES = 4096
# Of all matrices of a product's case: far above the caches.
MATRICES_BYTES = 100 * 10**6


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
    """Over the same tokens as they are, as fp8 and as int8."""
    kv_dtypes = (case.dtype, torch.float8_e4m3fn, torch.int8)
    pools = {str(kv_dtype): Pool(replace(case, kv_dtype=kv_dtype)) for kv_dtype in kv_dtypes}
    found = medians({name: pool.attend() for name, pool in pools.items()}, rounds)
    ratios, listed = times_of(str(case.dtype), found)
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


def bench_likeliest(dtype: torch.dtype, vocab_size: int, hidden_size: int, rounds: int) -> dict[str, object]:
    """The likeliest of all tokens, of 1, 8 and 64 rows: with bounds in 8 bits, beside making all logits."""
    kernels = CpuKernels(AttentionShape(1, 1, 64, BLOCK_SIZE, 1.0, dtype, dtype))
    linear = kernels.linear(torch.randn(vocab_size, hidden_size).to(dtype), None)
    sketch, norm = linear.sketch(), Norm(torch.ones(hidden_size, dtype=dtype), 1e-5)
    ratios: dict[int, float] = {}
    for num_rows in (1, 8, 64) if sketch else ():
        x = torch.randn(num_rows, hidden_size).to(dtype)
        candidates: Candidates = {
            "all": partial(linear.likeliest, x, norm, None),
            "bounds": partial(linear.likeliest, x, norm, sketch),
        }
        found = medians(candidates, rounds)
        ratios[num_rows] = found["bounds"] / found["all"]
    name = f"{str(dtype).removeprefix('torch.'):8} {hidden_size} -> {vocab_size}"
    listed = ", ".join(f"{n} rows {ratio:.2f}" for n, ratio in ratios.items())
    report(f"{name:46} {listed} of the time" if ratios else f"{name:46} no units for it here")
    return {"dtype": str(dtype), "vocab_size": vocab_size, "hidden_size": hidden_size, "times_all": ratios}


def bench_prefill(case: Case, rounds: int) -> dict[str, object]:
    """Time beside that of torch over contiguous KV."""
    pool = Pool(case)
    found = medians({"pagoda": pool.attend(), **torch_prefills(pool)}, rounds)
    best_torch = min(seconds for name, seconds in found.items() if name.startswith("torch"))
    ratio = found["pagoda"] / best_torch
    report(f"{case.name:46} pagoda {found['pagoda'] * 1e3:6.1f} ms, torch {best_torch * 1e3:6.1f} ms: {ratio:.2f} x")
    return {**row(case), "seconds": found, "times_of_torch": ratio}


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
    results = begin(hardware())
    cases = decode_cases(flags.megabytes)
    report("decode")
    results["decode"] = [bench_decode(case, flags.rounds) for case in cases]
    report("8-bit KV, in decode")
    results["8_bit"] = [bench_8_bit(case, flags.rounds) for case in cases[:5]]
    report("8-bit KV, in prefill of 1,024 tokens")
    results["8_bit_prefill"] = [
        bench_8_bit(Case(torch.bfloat16, 1, 1024, 1024, num_heads, 8, 128), flags.rounds) for num_heads in (8, 32)
    ]
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
    report("the likeliest token by bounds, beside all logits")
    results["likeliest"] = [
        bench_likeliest(dtype, vocab_size, hidden_size, flags.rounds)
        for dtype in (torch.bfloat16, torch.float32)
        for vocab_size, hidden_size in ((8192, 512), (128256, 2048))
    ]
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
