"""Paged is a drop-in for dense: the same decoder on either gives the same logits, and the worker the same ids."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.load.memory.caches import Cache, CacheFullError, DenseCache, PagedCache, decode
from tests.unit.worker_harness import LocalWorker, Planner
from worker.config import parse_config
from worker.loading import Loaded, load
from worker.models.spec import ModelSpec, read_spec

NUM_BLOCKS = 12
NUM_TOKENS = 24
PROMPT = [2 + i * 37 % (VOCAB_SIZE - 2) for i in range(41)]


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, loaded in float32 over a pool of NUM_BLOCKS."""

    flags: list[str]
    spec: ModelSpec
    loaded: Loaded

    def caches(self, max_model_len: int = NUM_BLOCKS * 16) -> tuple[DenseCache, PagedCache, BlockManager]:
        """One of each kind; the paged one's pool has been in use, so that its blocks are not in order."""
        blocks = BlockManager(NUM_BLOCKS, Changes())
        others = blocks.reserve(1, (), NUM_BLOCKS)
        blocks.release(1, others[::2])
        blocks.release(1, others[1::2])
        dense = DenseCache(self.spec, max_model_len, self.loaded.decoder.dtype)
        return dense, PagedCache(self.loaded.pool, blocks, seq_id=2), blocks


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    flags = ["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--num-blocks", str(NUM_BLOCKS)]
    config = parse_config(["--scheduler", "127.0.0.1:1", "--name", "caches", *flags])
    spec = read_spec(folder)
    return Model(flags, spec, load(config, spec, folder, NUM_BLOCKS * 16))


def ids(model: Model, cache: Cache) -> list[int]:
    """Of the decoder on a cache."""
    logits = decode(model.loaded.decoder, model.spec, cache, PROMPT, NUM_TOKENS)
    return logits.argmax(dim=-1).tolist()


def test_a_decoder_cannot_tell_paged_from_dense(model: Model) -> None:
    dense, paged, _ = model.caches()
    on_dense, on_paged = (
        decode(model.loaded.decoder, model.spec, cache, PROMPT, NUM_TOKENS) for cache in (dense, paged)
    )
    assert torch.equal(on_dense, on_paged)
    assert sorted(paged.block_ids) != paged.block_ids, "blocks in order show nothing"
    assert len(set(on_dense.argmax(dim=-1).tolist())) > NUM_TOKENS // 4, "one token again and again shows nothing"


def test_the_worker_s_kernels_read_what_either_holds(model: Model) -> None:
    worker, planner = LocalWorker(*model.flags), Planner(16, NUM_BLOCKS)
    planner.add(1, PROMPT)
    planner.apply(worker.run(planner.plan({1: len(PROMPT)})))
    for _ in range(NUM_TOKENS - 1):
        planner.apply(worker.run(planner.plan({1: 1})))
    dense, paged, _ = model.caches()
    assert planner.sequences[1].output == ids(model, dense) == ids(model, paged)


def test_a_paged_cache_takes_what_its_tokens_fill_and_gives_all_of_it_back(model: Model) -> None:
    dense, paged, blocks = model.caches()
    first = ids(model, paged)
    num_tokens = len(PROMPT) + NUM_TOKENS - 1  # the last one is never run
    assert len(paged.block_ids) == -(-num_tokens // 16)
    assert blocks.num_referenced_blocks == len(paged.block_ids)
    paged.reset()
    assert blocks.num_available_blocks == NUM_BLOCKS
    ids(model, dense)
    dense.reset()
    assert ids(model, paged) == ids(model, dense) == first


def test_a_full_cache_refuses_and_stays_as_it_is(model: Model) -> None:
    dense, paged, blocks = model.caches(max_model_len=20)
    rows = torch.randn(20, model.spec.num_kv_heads, model.spec.head_dim)
    for cache in (dense, paged):
        cache.append(0, rows, -rows)
    blocks.reserve(3, (), blocks.num_available_blocks)
    for cache in (dense, paged):
        with pytest.raises(CacheFullError):
            cache.append(0, rows, rows)
        keys, values = cache.read(0)
        assert torch.equal(keys, rows)
        assert torch.equal(values, -rows)
