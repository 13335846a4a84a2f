"""What `make bench-cuda` would do on a GPU, on emulated kernels: each figure is there, and nothing wrong is timed."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.cuda import bench as module
from kernels.cuda.bench import EVEN, PREFIX, PROMPTS, SINGLE, SKEWED, Bench
from kernels.cuda.bench_layers import BLOCK_SIZE, Case, Run
from tests.kernels.cuda.backends import EMULATION

NUM_BYTES = 400_000
SMALL = Case("small", (70, 5), group_size=2, num_kv_heads=2, head_dim=64)


class HostClock:
    """See Clock: emulated kernels have ended when their call returns."""

    def record(self, run: Run) -> Callable[[], float]:
        def seconds() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return seconds


@pytest.fixture
def bench() -> Bench:
    torch.manual_seed(0)
    return Bench(torch.device("cpu"), EMULATION, HostClock(), NUM_BYTES, rounds=2)


def test_decode(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench.decode(SMALL)
    assert found["kv_bytes"] == 6 * 2 * 2 * 16 * 64 * 2, "six blocks, keys and values, heads, tokens, bfloat16"
    speeds = found["GB/s"]
    assert isinstance(speeds, dict)
    assert {"copy", "pagoda"} <= set(speeds)
    assert found["share_of_copy"] == speeds["pagoda"] / speeds["copy"] > 0
    assert "of a copy's" in capsys.readouterr().out
    json.dumps(found)


def test_time_is_of_one_layer(bench: Bench) -> None:
    """Whatever their number, and whatever is beside it."""
    layers = bench.layers(SMALL)
    assert layers.num_layers == round(NUM_BYTES / layers.kv_bytes) > 1
    assert len(layers.layers) == layers.num_layers
    found = bench.decode(SMALL)
    speeds, microseconds = found["GB/s"], found["us"]
    assert isinstance(speeds, dict)
    assert isinstance(microseconds, float)
    assert speeds["pagoda"] == pytest.approx(layers.kv_bytes / microseconds / 1e3)


def test_the_other_figures(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    eight_bit = bench.eight_bit(
        Case("small", (40,), group_size=1, num_kv_heads=1, head_dim=128), (torch.float8_e4m3fn,)
    )
    assert set(eight_bit["times_own"]) == {"torch.bfloat16", "torch.float8_e4m3fn"}  # type: ignore[call-overload]
    assert set(bench.indirection(SMALL)["GB/s"]) == {"shuffled", "ordered", "contiguous"}  # type: ignore[call-overload]
    prefix = Case("small", (70,) * 3, group_size=2, num_kv_heads=2, head_dim=64, prefix_len=64)
    assert bench.shared_prefix(prefix)["times_own"]
    prompts = Case("small", (40, 40), group_size=2, num_kv_heads=1, head_dim=64, query_len=40)
    assert set(bench.prefill(prompts)["TFLOP/s"]) == {"pagoda", "torch"}  # type: ignore[call-overload]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_shared_prefix_is_in_all_tables(bench: Bench) -> None:
    prefix = Case("small", (70,) * 3, group_size=2, num_kv_heads=2, head_dim=64, prefix_len=64)
    tables = bench.layers(prefix).tables
    assert (tables[:, :4] == tables[0, :4]).all()
    assert len(set(tables[:, 4].tolist())) == 3


def test_who_is_wrong_or_does_not_run_is_not_timed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    layers = bench.layers(SMALL)
    right = layers.attend()()
    wrong = {"zero": torch.zeros_like(right), "shifted": right.roll(1, 0), "nan": right * float("nan")}
    for name, found in wrong.items():
        with pytest.raises(ArithmeticError, match=rf"{name} is off by .* in small"):
            layers.check(name, lambda found=found: found)

    def missing() -> torch.Tensor:
        raise RuntimeError("no kernel")

    assert list(layers.usable({"same": lambda: right, "other": lambda: wrong["zero"], "missing": missing})) == ["same"]
    assert capsys.readouterr().err.splitlines() == [
        "without other: other is off by 1.0e+00 in small",
        "without missing: no kernel",
    ]


def test_who_has_no_graph_is_not_timed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    class Choosy(HostClock):
        def record(self, run: Run) -> Callable[[], float]:
            if run is no_graph:
                raise RuntimeError("it allocates")
            return super().record(run)

    def no_graph() -> torch.Tensor:
        return torch.zeros(1)

    choosy = replace(bench, clock=Choosy())
    assert list(choosy.medians({"ours": lambda: torch.ones(1)}, {"theirs": no_graph})) == ["ours"]
    assert capsys.readouterr().err == "without theirs: it allocates\n"
    with pytest.raises(RuntimeError, match="it allocates"):
        choosy.medians({"ours": no_graph})


def test_a_peer_that_breaks_at_its_import_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "flashinfer.py").write_text("raise OSError('no compiler')")
    monkeypatch.syspath_prepend(tmp_path)
    assert bench.layers(SMALL).peers() == {}
    assert "without flashinfer: OSError('no compiler')" in capsys.readouterr().err


@pytest.mark.parametrize(("lens", "query_len"), [((5, 9), 1), ((8, 8), 8), ((9, 20), 3)])
def test_operations_are_two_products_for_each_key_that_a_query_sees(lens: tuple[int, ...], query_len: int) -> None:
    case = Case("small", lens, group_size=3, num_kv_heads=2, head_dim=64, query_len=query_len)
    pairs = sum(position + 1 for length in lens for position in range(length - query_len, length))
    assert case.flop == 2 * 2 * pairs * 6 * 64


def test_cases_are_those_that_goals_are_named_for() -> None:
    for case in EVEN:
        layer_bytes = 2 * sum(case.context_lens) * case.num_kv_heads * case.head_dim * case.dtype.itemsize
        assert layer_bytes >= 0.5e9
    assert {case.group_size for case in EVEN} == {1, 2, 4, 8}
    assert [len(case.context_lens) for case in SKEWED] == [16, 32, 64]
    assert [case.context_lens for case in SINGLE] == [(1024,), (2048,), (4096,)]
    for case in (PREFIX, *PROMPTS):
        assert case.prefix_len % BLOCK_SIZE == 0
        assert case.query_len <= min(case.context_lens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench"])
    assert module.main() == 1
    assert capsys.readouterr().err == "no CUDA device: nothing to measure\n"
