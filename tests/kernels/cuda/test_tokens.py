"""Whole models on the emulated CUDA kernels: the greedy ids of transformers, in float32, through plans and chunks."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import AttentionShape, self_check
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import Variant
from tests.kernels.cuda.steps import MAX_PARTITIONS, PARTITION_LEN, open_emulated
from tests.unit.test_worker_models import NUM_OUTPUT, PROMPT_LENS, generate, reference, start


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(autouse=True)
def _emulated_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The worker tries them, as it does all native kernels, finds nothing wrong, and attends with them."""
    opened: list[Variant] = []

    def open_library(variant: Variant) -> KernelLibrary:
        opened.append(variant)
        return open_emulated(variant)

    def select(device: torch.device, shape: AttentionShape) -> CudaKernels:
        backend = Backend(open_library, lambda: 0)
        return CudaKernels(device, shape, backend, Tuning(PARTITION_LEN, MAX_PARTITIONS))

    monkeypatch.setattr(self_check, "select_kernels", select)
    yield
    assert opened
    assert not [record for record in caplog.records if record.name == "pagoda.kernels" and record.levelname == "ERROR"]


@pytest.mark.parametrize(("family", "block_size"), [("qwen2", 16), ("mistral", 32), ("qwen3", 16)])
def test_greedy_equals_transformers(family: str, block_size: int, directory: Path) -> None:
    """Windows in some layers or all, seven queries to a KV head, norms on heads; prompts in chunks beside decodes."""
    worker, planner = start(family, directory, block_size)
    assert generate(worker, planner, 7, random.Random(7)) == reference(family, directory)


def test_forks_go_on_from_copied_blocks(directory: Path) -> None:
    worker, planner = start("qwen3", directory, 16)
    for step in range(NUM_OUTPUT):
        if step == 5:
            for seq_id in range(len(PROMPT_LENS)):
                planner.fork(seq_id, 100 + seq_id)
        scheduled = {s.seq_id: s.num_tokens - s.num_computed for s in planner.sequences.values()}
        planner.apply(worker.run(planner.plan(scheduled)))
    outputs = [planner.sequences[seq_id].output for seq_id in range(len(PROMPT_LENS))]
    children = [planner.sequences[100 + seq_id].output for seq_id in range(len(PROMPT_LENS))]
    assert outputs == children == reference("qwen3", directory)
