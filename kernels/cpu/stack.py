"""A model's layers and their KV, laid out once for `layers.cpp`."""

from collections.abc import Sequence

import torch

from kernels import Layer, LayerKV
from kernels.cpu import binding
from kernels.cpu.linear import PackedGatedLinear, PackedLinear


class LayerStack:
    """Owns the C structures; keeps alive what they point to. Every matrix was packed by `kernels.cpu.linear`."""

    def __init__(self, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> None:
        self._layers = layers
        self._kv = kv
        self.windows = sorted({layer.sliding_window for layer in layers})
        structures = [self._structure(layer, layer_kv) for layer, layer_kv in zip(layers, kv, strict=True)]
        self.c_layers = (binding.Layer * len(layers))(*structures)
        self._widths = (
            _packed(layers[0].qkv).num_outputs,
            *(_packed(x).num_inputs for x in (layers[0].o, layers[0].down)),
        )

    def __len__(self) -> int:
        return len(self._layers)

    def is_of(self, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> bool:
        """Whether these very objects are laid out here."""
        return self._layers is layers and self._kv is kv

    def scratch(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Room for heads, attended and gated of LayersCall."""
        return [hidden.new_empty((hidden.shape[0], width)) for width in self._widths]

    def _structure(self, layer: Layer, kv: LayerKV) -> binding.Layer:
        norms = layer.head_norms
        assert layer.post_norm.epsilon == layer.input_norm.epsilon
        return binding.Layer(
            *(_packed(x).structure for x in (layer.qkv, layer.o, layer.gate_up, layer.down)),
            layer.input_norm.weight.data_ptr(),
            layer.post_norm.weight.data_ptr(),
            norms.query.data_ptr() if norms else None,
            norms.key.data_ptr() if norms else None,
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            layer.input_norm.epsilon,
            norms.epsilon if norms else 0.0,
            self.windows.index(layer.sliding_window),
        )


def _packed(linear: object) -> PackedLinear | PackedGatedLinear:
    assert isinstance(linear, PackedLinear | PackedGatedLinear)
    return linear
