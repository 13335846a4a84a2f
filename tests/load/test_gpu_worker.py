"""The benchmark of a GPU worker's step, on the CPU: that it is there for the day when there is a GPU."""

import json
from pathlib import Path

import pytest

from tests.load import bench_gpu_worker


def test_it_times_steps_and_writes_them_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu_worker, "COPIED_BYTES", 2**20)
    flags = ["--device", "cpu", "--checkpoint", "tiny", "--num-seqs", "3", "--prompt-len", "17", "--steps", "8"]
    bench_gpu_worker.main([*flags, "--json", str(tmp_path / "found.json")])
    (row,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["steps"]
    assert (row["num_seqs"], row["prompt_len"], row["num_steps"]) == (3, 17, 8)
    assert set(row["seconds"]) == {
        *(f"{name}, {how}" for name in ("graphs", "eager") for how in ("queued", "one by one")),
        "reading",
    }
    assert all(0 < seconds < 60 for seconds in row["seconds"].values())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu_worker.main([])
