"""Every family against transformers: greedy ids in float32, through plans, blocks and chunks, in a poisoned pool."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import FAMILIES, MAX_MODEL_LEN, VOCAB_SIZE, make_checkpoint
from tests.unit.worker_harness import LocalWorker, Planner

NUM_BLOCKS = 40
NUM_OUTPUT = 20
PROMPT_LENS = (1, 2, 15, 16, 17, 33, 61)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small lose time to threads, and tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@functools.cache
def checkpoint(family: str, directory: Path) -> Path:
    return make_checkpoint(family, directory / family)


@functools.cache
def prompts(family: str) -> list[list[int]]:
    rng = random.Random(family)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENS]


@functools.cache
def reference(family: str, directory: Path) -> list[list[int]]:
    """What transformers generates for `prompts`, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family, directory), dtype=torch.float32)
    outputs = []
    for prompt in prompts(family):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def generate(worker: LocalWorker, planner: Planner, chunk: int, shuffle: random.Random) -> list[list[int]]:
    """Run all sequences to NUM_OUTPUT tokens: prompts in chunks, mixed with decodes, order changing at each step."""
    outputs: dict[int, list[int]] = {}
    while planner.sequences:
        waiting = list(planner.sequences.values())
        shuffle.shuffle(waiting)
        # Some rest at each step, so that no two steps batch the same rows.
        running = waiting[: max(1, len(waiting) * 3 // 4)]
        scheduled = {s.seq_id: min(chunk, s.num_tokens - s.num_computed) for s in running}
        planner.apply(worker.run(planner.plan(scheduled)))
        for sequence in running:
            if len(sequence.output) >= NUM_OUTPUT:
                outputs[sequence.seq_id] = sequence.output
                planner.remove(sequence.seq_id)
    return [outputs[seq_id] for seq_id in sorted(outputs)]


def start(family: str, directory: Path, block_size: int, *flags: str) -> tuple[LocalWorker, Planner]:
    model = str(checkpoint(family, directory))
    worker = LocalWorker(
        "--model",
        model,
        "--num-blocks",
        str(NUM_BLOCKS),
        "--block-size",
        str(block_size),
        "--poison-freed-blocks",
        *flags,
    )
    planner = Planner(block_size, NUM_BLOCKS)
    for seq_id, prompt in enumerate(prompts(family)):
        planner.add(seq_id, prompt)
    return worker, planner


@pytest.mark.parametrize("chunk", [1, 7, 16, MAX_MODEL_LEN])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, chunk: int, directory: Path) -> None:
    worker, planner = start(family, directory, 16)
    assert generate(worker, planner, chunk, random.Random(chunk)) == reference(family, directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_32(family: str, directory: Path) -> None:
    worker, planner = start(family, directory, 32)
    assert generate(worker, planner, 10, random.Random(0)) == reference(family, directory)


def test_sequences_sent_again_in_full_keep_their_blocks(directory: Path) -> None:
    """As a new owner sends them: what is computed is not computed again, and nothing else is believed."""
    worker, planner = start("llama3", directory, 16)
    shuffle = random.Random(3)
    outputs = {}
    while planner.sequences:
        for seq_id in shuffle.sample(sorted(planner.sequences), len(planner.sequences) // 2):
            planner.send_in_full(seq_id)
        scheduled = {s.seq_id: min(9, s.num_tokens - s.num_computed) for s in planner.sequences.values()}
        planner.apply(worker.run(planner.plan(scheduled)))
        for sequence in list(planner.sequences.values()):
            if len(sequence.output) == NUM_OUTPUT:
                outputs[sequence.seq_id] = sequence.output
                planner.remove(sequence.seq_id)
    assert [outputs[seq_id] for seq_id in sorted(outputs)] == reference("llama3", directory)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_forks_go_on_from_copied_blocks(family: str, directory: Path) -> None:
    worker, planner = start(family, directory, 16)
    for step in range(NUM_OUTPUT):
        for seq_id in range(len(PROMPT_LENS)):
            if step == seq_id + 3:  # each at another fill of its last block
                planner.fork(seq_id, 100 + seq_id)
        scheduled = {s.seq_id: s.num_tokens - s.num_computed for s in planner.sequences.values()}
        planner.apply(worker.run(planner.plan(scheduled)))
    outputs = [planner.sequences[seq_id].output for seq_id in range(len(PROMPT_LENS))]
    children = [planner.sequences[100 + seq_id].output for seq_id in range(len(PROMPT_LENS))]
    assert outputs == children == reference(family, directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, directory: Path) -> None:
    """First tokens only: random weights have near ties, and after one other token the texts have nothing in common."""
    worker, planner = start("qwen3", directory, 16, "--dtype", dtype)
    assert worker.description.pool.kv_dtype == dtype
    planner.apply(worker.run(planner.plan({s.seq_id: s.num_tokens for s in planner.sequences.values()})))
    firsts = [planner.sequences[i].output[0] for i in range(len(PROMPT_LENS))]
    same = sum(a == b[0] for a, b in zip(firsts, reference("qwen3", directory), strict=True))
    assert same >= len(PROMPT_LENS) - 2


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bit_kv_stays_near_and_does_not_depend_on_chunks(kv_cache_dtype: str, directory: Path) -> None:
    """A prompt's later chunks see its earlier ones rounded; so must the rest of a chunk."""
    flags = ("--dtype", "float32", "--kv-cache-dtype", kv_cache_dtype)
    outputs = []
    for chunk in (7, 16, MAX_MODEL_LEN):
        worker, planner = start("llama3", directory, 16, *flags)
        outputs.append(generate(worker, planner, chunk, random.Random(chunk)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert worker.description.pool.kv_dtype.startswith("float32/")
    # A byte per element and a scale per 8 of them, beside 4 bytes per element.
    plain, _ = start("llama3", directory, 16, "--dtype", "float32")
    assert worker.description.pool.block_bytes * 8 == plain.description.pool.block_bytes * 3
    same = sum(a[0] == b[0] for a, b in zip(outputs[0], reference("llama3", directory), strict=True))
    assert same >= len(PROMPT_LENS) - 2


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_on_cuda_equals_transformers(family: str, directory: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    worker, planner = start(family, directory, 16, "--device", "cuda", "--dtype", "float32")
    assert generate(worker, planner, 7, random.Random(7)) == reference(family, directory)
