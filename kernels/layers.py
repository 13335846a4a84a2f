"""The layers of a step, operation by operation: for every implementation that has no faster way."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Angles, AttentionStep, Draws, Layer, LayerKV, Model


class UnfusedStep(AttentionStep):
    """An `AttentionStep` that has its operations, and nothing that is made of several."""

    def run_layers(
        self,
        layers: Sequence[Layer],
        kv: Sequence[LayerKV],
        hidden: torch.Tensor,
        angles: Angles,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.run_layers`."""
        head_dim = 2 * angles.cos.shape[-1]
        for i, (layer, layer_kv) in enumerate(zip(layers, kv, strict=True), start=1):
            heads = layer.qkv.of_normed(hidden, layer.input_norm)
            heads = heads.view(len(hidden), -1, head_dim)
            query = self.rotate_and_write(heads, angles, layer.head_norms, layer_kv)
            wanted = rows if i == len(layers) else None
            if wanted is not None and not len(wanted):
                return hidden[:0]
            attended = self.attend(query, layer_kv, layer.sliding_window).flatten(1)
            if wanted is not None:
                attended, hidden = attended[wanted], hidden[wanted]
            layer.o.add(attended, hidden)
            layer.down.add(layer.gate_up.of_normed(hidden, layer.post_norm), hidden)
        return hidden

    def decode(
        self,
        model: Model,
        kv: Sequence[LayerKV],
        input_ids: NDArray[np.int64],
        steps_each: NDArray[np.int64],
        draws: Draws | None,
    ) -> None:
        """See `kernels.AttentionStep.decode`: one step at a time."""
