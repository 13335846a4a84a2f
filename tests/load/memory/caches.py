"""One sequence's keys and values behind one small face, dense and paged, and a step that runs a decoder on either.

A dense cache is a tensor of max_model_len slots. A paged one names blocks of a pool, as many as its tokens fill: the
pool, its format and the block manager are the ones that serve.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from kernels import Angles, HeadNorms, LayerKV
from kernels.layers import UnfusedStep
from scheduler.block_manager import BlockManager
from worker.kv_pool import KVPool
from worker.models.decoder import Decoder
from worker.models.spec import ModelSpec


class CacheFullError(Exception):
    """There is no room for more tokens."""


class Cache(Protocol):
    """Of one sequence, in all layers."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens to a layer. keys, values: [num_tokens, num_kv_heads, head_dim]. Raises CacheFullError."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all of a layer's tokens, in float32: as in `append`."""

    def reset(self) -> None:
        """Forget all tokens; what was taken for them is free."""


class DenseCache:
    """See Cache. Takes max_model_len slots at once."""

    def __init__(self, spec: ModelSpec, max_model_len: int, dtype: torch.dtype) -> None:
        self._slots = torch.empty((spec.num_layers, 2, max_model_len, spec.num_kv_heads, spec.head_dim), dtype=dtype)
        self._num_tokens = [0] * spec.num_layers

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See Cache."""
        start, end = self._num_tokens[layer], self._num_tokens[layer] + len(keys)
        if end > self._slots.shape[2]:
            raise CacheFullError(f"{end} tokens in {self._slots.shape[2]} slots")
        self._slots[layer, 0, start:end] = keys
        self._slots[layer, 1, start:end] = values
        self._num_tokens[layer] = end

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See Cache."""
        keys, values = self._slots[layer, :, : self._num_tokens[layer]].float()
        return keys, values

    def reset(self) -> None:
        """See Cache. The slots stay its own."""
        self._num_tokens = [0] * len(self._num_tokens)


class PagedCache:
    """See Cache. Takes a block when the last one is full."""

    def __init__(self, pool: KVPool, blocks: BlockManager, seq_id: int) -> None:
        self.block_ids: list[int] = []
        self._pool = pool
        self._blocks = blocks
        self._seq_id = seq_id
        self._num_tokens = [0] * len(pool.layers)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See Cache."""
        block_size = self._pool.kv_format.block_size
        start, end = self._num_tokens[layer], self._num_tokens[layer] + len(keys)
        num_short = -(-end // block_size) - len(self.block_ids)
        if num_short > self._blocks.num_available_blocks:
            raise CacheFullError(f"{num_short} blocks of {self._blocks.num_available_blocks}")
        if num_short > 0:
            self.block_ids += self._blocks.reserve(self._seq_id, (), num_short)
        positions = torch.arange(start, end)
        slots = torch.tensor(self.block_ids)[positions // block_size] * block_size + positions % block_size
        places = self._pool.kv_format.places(slots)
        self._pool.kv_format.write_keys(self._pool.layers[layer].keys, places, keys)
        self._pool.kv_format.write_values(self._pool.layers[layer].values, places, values)
        self._num_tokens[layer] = end

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See Cache."""
        kv, kv_format = self._pool.layers[layer], self._pool.kv_format
        keys = kv_format.read_keys(kv.keys[self.block_ids])
        values = kv_format.read_values(kv.values[self.block_ids])
        return self._in_order(layer, keys), self._in_order(layer, values)

    def reset(self) -> None:
        """See Cache."""
        self._blocks.release(self._seq_id, self.block_ids)
        self.block_ids = []
        self._num_tokens = [0] * len(self._num_tokens)

    def _in_order(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """rows: [num_blocks, num_kv_heads, block_size, head_dim]."""
        return rows.transpose(1, 2).flatten(0, 1)[: self._num_tokens[layer]]


class CacheStep(UnfusedStep):
    """A `kernels.AttentionStep` of one sequence, whose layers are numbers in its cache. For models without windows."""

    def __init__(self, spec: ModelSpec, cache: Cache) -> None:
        self._spec = spec
        self._cache = cache

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """See AttentionStep."""
        spec = self._spec
        query, keys, values = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if norms is not None:
            query = F.rms_norm(query, (spec.head_dim,), norms.query, norms.epsilon)
            keys = F.rms_norm(keys, (spec.head_dim,), norms.key, norms.epsilon)
        self._cache.append(cast(int, layer), _turned(keys, angles), values)
        return _turned(query, angles)

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See AttentionStep."""
        keys, values = (x.transpose(0, 1) for x in self._cache.read(cast(int, layer)))
        group_size = self._spec.num_heads // self._spec.num_kv_heads
        scores = query.float().transpose(0, 1) @ keys.repeat_interleave(group_size, 0).transpose(1, 2)
        num_before = keys.shape[1] - len(query)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(num_before + 1)
        weights = (scores * self._spec.head_dim**-0.5).masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return (weights @ values.repeat_interleave(group_size, 0)).transpose(0, 1).to(query.dtype)


def _turned(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin), dim=-1)


@torch.inference_mode()
def decode(decoder: Decoder, spec: ModelSpec, cache: Cache, prompt: list[int], num_tokens: int) -> torch.Tensor:
    """Greedily, the whole prompt at once, then token by token: the logits of each, [num_tokens, vocab_size]."""
    step, kv = CacheStep(spec, cache), cast(Sequence[LayerKV], range(spec.num_layers))
    logits: list[torch.Tensor] = []
    input_ids, first = torch.tensor(prompt), 0
    while len(logits) < num_tokens:
        positions = torch.arange(first, first + len(input_ids))
        hidden = decoder.hidden(input_ids, positions, step, kv)
        logits.append(decoder.logits(hidden[-1:])[0])
        first += len(input_ids)
        input_ids = logits[-1].argmax()[None]
    return torch.stack(logits)
