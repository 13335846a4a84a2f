"""The one decoder of all supported families: pre-norm, rotary, grouped-query attention, gated MLP.

Owns the order of operations. Weights come from `worker.weights`, attention from `kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import Angles, AttentionStep, HeadNorms, Kernels, LayerKV, Linear, Norm
from worker.models.rope import Rope
from worker.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """Of y = x W^T + b. weight: [out, in]; bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv stacks query, key and value heads; gate_up stacks gate and up; q_norm, k_norm: [head_dim]."""

    input_norm: torch.Tensor
    qkv: LinearWeights
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: LinearWeights
    post_norm: torch.Tensor
    gate_up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """embedding, lm_head: [vocab_size, hidden_size], one tensor where they are tied; norm: [hidden_size]."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What one forward runs. input_ids, positions: [num_tokens] int64; sampled_rows: [num_samples] int64, the tokens
    whose logits are wanted."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    sampled_rows: torch.Tensor


class Decoder:
    """Runs a model's layers over flattened tokens."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, kernels: Kernels) -> None:
        """Takes the layers out of `weights` one by one: kernels may keep their own copy of each matrix."""
        self._spec = spec
        self._embedding = weights.embedding
        self._layers = [_Layer(spec, weights.layers.pop(0), window, kernels) for window in spec.sliding_windows]
        self._norm = Norm(weights.norm, spec.rms_norm_eps)
        self._lm_head = kernels.linear(weights.lm_head, None)
        self._rope = Rope(spec.rope, spec.head_dim, weights.embedding.device)

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the model's dtype, on its device."""
        return self._embedding

    def forward(self, batch: TokenBatch, attention: AttentionStep, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Write the tokens' keys and values into `kv` and return logits: [num_samples, vocab_size] float32."""
        hidden = F.embedding(batch.input_ids, self._embedding)
        angles = self._rope.angles(batch.positions, hidden.dtype)
        for i, layer in enumerate(self._layers):
            layer.forward(hidden, angles, attention, kv[i])
        return self._lm_head.logits(hidden[batch.sampled_rows], self._norm)


class _Layer:
    """One layer, its matrices as the kernels want them."""

    def __init__(self, spec: ModelSpec, weights: LayerWeights, sliding_window: int, kernels: Kernels) -> None:
        def linear(of: LinearWeights) -> Linear:
            return kernels.linear(of.weight, of.bias)

        eps = spec.rms_norm_eps
        self._heads = (spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        self._sliding_window = sliding_window
        self._input_norm, self._post_norm = Norm(weights.input_norm, eps), Norm(weights.post_norm, eps)
        self._head_norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._head_norms = HeadNorms(weights.q_norm, weights.k_norm, eps)
        self._qkv, self._o = linear(weights.qkv), linear(weights.o)
        self._gate_up, self._down = linear(weights.gate_up), linear(weights.down)

    def forward(self, hidden: torch.Tensor, angles: Angles, attention: AttentionStep, kv: LayerKV) -> None:
        """Adds the layer's attention and MLP to `hidden`, [num_tokens, hidden_size]."""
        heads = self._qkv.of_normed(hidden, self._input_norm).view(-1, *self._heads)
        query = attention.rotate_and_write(heads, angles, self._head_norms, kv)
        self._o.add(attention.attend(query, kv, self._sliding_window).flatten(1), hidden)
        self._down.add_gated(self._gate_up.of_normed(hidden, self._post_norm), hidden)
