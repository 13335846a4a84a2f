"""The one decoder of all supported families, from token ids to logits.

Weights come from `worker.weights`; `kernels` run the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionStep, Draws, HeadNorms, Kernels, Layer, LayerKV, Model, Norm
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


class Decoder:
    """Runs a model's layers over flattened tokens."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, kernels: Kernels, max_model_len: int) -> None:
        """Takes the layers out of `weights` one by one: kernels may keep their own copy of each matrix."""
        self._embedding = weights.embedding
        self._layers = [_layer(spec, weights.layers.pop(0), window, kernels) for window in spec.sliding_windows]
        self._norm = Norm(weights.norm, spec.rms_norm_eps)
        self._lm_head = kernels.linear(weights.lm_head, None)
        self._rope = Rope(spec.rope, spec.head_dim, max_model_len, self.dtype, self.device)
        angles = self._rope.cos, self._rope.sin
        self._model = Model(self._embedding, self._layers, *angles, self._norm, self._lm_head)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._embedding.device

    def hidden(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionStep,
        kv: Sequence[LayerKV],
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the tokens' keys and values into `kv`; the hidden states of `rows`, or of all: [..., hidden_size].

        input_ids, positions: [num_tokens] int64; rows: [num_rows] int64, of tokens.
        """
        hidden = self._embedding.index_select(0, input_ids)
        return attention.run_layers(self._layers, kv, hidden, self._rope.angles(positions), rows)

    def decode(
        self,
        input_ids: NDArray[np.int64],
        attention: AttentionStep,
        kv: Sequence[LayerKV],
        steps_each: NDArray[np.int64],
        draws: Draws | None,
    ) -> NDArray[np.int64] | None:
        """See `kernels.AttentionStep.decode`."""
        return attention.decode(self._model, kv, input_ids, steps_each, draws)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states [num_rows, hidden_size]: [num_rows, vocab_size] float32."""
        return self._lm_head.logits(hidden, self._norm)


def _layer(spec: ModelSpec, weights: LayerWeights, sliding_window: int, kernels: Kernels) -> Layer:
    eps = spec.rms_norm_eps
    head_norms = None
    if weights.q_norm is not None and weights.k_norm is not None:
        head_norms = HeadNorms(weights.q_norm, weights.k_norm, eps)
    return Layer(
        input_norm=Norm(weights.input_norm, eps),
        qkv=kernels.linear(weights.qkv.weight, weights.qkv.bias),
        head_norms=head_norms,
        o=kernels.linear(weights.o.weight, weights.o.bias),
        post_norm=Norm(weights.post_norm, eps),
        gate_up=kernels.gated(weights.gate_up.weight, weights.gate_up.bias),
        down=kernels.linear(weights.down.weight, weights.down.bias),
        sliding_window=sliding_window,
    )
