"""Whole models on the emulated CUDA kernels: the greedy ids of transformers, in float32, through plans and chunks."""

import random
from pathlib import Path

import pytest

from tests.kernels.cuda.backends import EMULATION, PTX, needs_nvcc
from tests.unit.test_worker_models import NUM_OUTPUT, PROMPT_LENS, generate, reference, start

pytestmark = pytest.mark.usefixtures("emulated_worker")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    ("family", "block_size", "worker_backend"),
    [
        pytest.param("qwen2", 16, EMULATION, id="qwen2"),
        pytest.param("mistral", 32, EMULATION, id="mistral"),
        pytest.param("qwen3", 16, EMULATION, id="qwen3"),
        pytest.param("qwen3", 16, PTX, id="qwen3-ptx", marks=needs_nvcc),
        pytest.param("mistral", 32, PTX, id="mistral-ptx", marks=[needs_nvcc, pytest.mark.slow]),
    ],
)
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


def test_8_bit_kv_does_not_depend_on_chunks(directory: Path) -> None:
    """A prompt's later chunks see its earlier ones rounded; so must the rest of a chunk."""
    outputs = []
    for chunk in (7, 16):
        worker, planner = start("qwen3", directory, 16, "--dtype", "float32", "--kv-cache-dtype", "int8")
        outputs.append(generate(worker, planner, chunk, random.Random(chunk)))
    assert worker.description.pool.kv_dtype == "float32/int8"
    assert outputs[0] == outputs[1]
    same = sum(a[0] == b[0] for a, b in zip(outputs[0], reference("qwen3", directory), strict=True))
    assert same >= len(PROMPT_LENS) - 2
