"""The one decoder of all supported families: pre-norm, rotary, grouped-query attention, gated MLP.

Owns the order of operations. Weights come from `worker.weights`, attention from `kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import AttentionStep, LayerKV
from worker.models.rope import Rope, rotate
from worker.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b. weight: [out, in]; bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in]; returns [num_tokens, out]."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv stacks query, key and value heads; gate_up stacks gate and up; q_norm, k_norm: [head_dim]."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """embedding, lm_head: [vocab_size, hidden_size], one tensor where they are tied; norm: [hidden_size]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
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

    def __init__(self, spec: ModelSpec, weights: ModelWeights) -> None:
        self._spec = spec
        self._weights = weights
        self._rope = Rope(spec.rope, spec.head_dim, weights.embedding.device)

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the model's dtype, on its device."""
        return self._weights.norm

    def forward(self, batch: TokenBatch, attention: AttentionStep, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Write the tokens' keys and values into `kv` and return logits: [num_samples, vocab_size] float32."""
        weights, eps = self._weights, self._spec.rms_norm_eps
        hidden = F.embedding(batch.input_ids, weights.embedding)
        cos, sin = self._rope.angles(batch.positions, hidden.dtype)
        for i, layer in enumerate(weights.layers):
            normed = _rms_norm(hidden, layer.input_norm, eps)
            query, key, value = self._heads(layer, normed, cos, sin)
            attention.write_kv(key, value, kv[i])
            attended = attention.attend(query, kv[i], self._spec.sliding_windows[i])
            hidden = hidden + layer.o(attended.flatten(1))
            gate, up = layer.gate_up(_rms_norm(hidden, layer.post_norm, eps)).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        sampled = _rms_norm(hidden[batch.sampled_rows], weights.norm, eps)
        return F.linear(sampled, weights.lm_head).float()

    def _heads(
        self, layer: LayerWeights, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each [num_tokens, its heads, head_dim], the first two turned by their positions."""
        spec = self._spec
        heads = layer.qkv(normed).view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        turned, value = torch.split(heads, [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = torch.split(turned, [spec.num_heads, spec.num_kv_heads], dim=1)
            query = _rms_norm(query, layer.q_norm, spec.rms_norm_eps)
            key = _rms_norm(key, layer.k_norm, spec.rms_norm_eps)
            return rotate(query, cos, sin), rotate(key, cos, sin), value
        query, key = torch.split(rotate(turned, cos, sin), [spec.num_heads, spec.num_kv_heads], dim=1)
        return query, key, value


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
