"""A model's layers, their KV and room for what they compute, laid out once for `layers.cpp`."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import Angles, Layer, LayerKV
from kernels.cpu import binding
from kernels.cpu.linear import PackedGatedLinear, PackedLinear
from kernels.cpu.memory import empty_on_huge_pages

# kTileHeight of tiles.h
TILE_HEIGHT = 16


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a step's tokens end up. rows: [num_rows] int64, which of them; hidden: [num_rows, hidden_size]."""

    rows: torch.Tensor
    hidden: torch.Tensor


class LayerStack:
    """Owns the C structures; keeps alive what they point to. Every matrix was packed by `kernels.cpu.linear`."""

    def __init__(self, c_shape: binding.Shape, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> None:
        self._layers = layers
        self._kv = kv
        self.windows = sorted({layer.sliding_window for layer in layers})
        structures = [self._structure(layer, layer_kv) for layer, layer_kv in zip(layers, kv, strict=True)]
        self._c_layers = (binding.Layer * len(layers))(*structures)
        self._c_windows = (binding.WindowWork * len(self.windows))()
        self._call = binding.LayersCall(
            shape=ctypes.pointer(c_shape), layers=self._c_layers, windows=self._c_windows, num_layers=len(layers)
        )
        self._room: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []  # of a step, where the C++ makes them
        self._input_addresses: list[int] = []
        self._num_tokens = 0  # that there is room for

    def is_of(self, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> bool:
        """Whether these very objects are laid out here."""
        return self._layers is layers and self._kv is kv

    def call(
        self,
        hidden: torch.Tensor,
        angles: Angles,
        slot_mapping: torch.Tensor,
        works: list[binding.WindowWork],
        outputs: Outputs | None = None,
    ) -> binding.LayersCall:
        """A step; works: one for each of `windows`; without `outputs` all tokens end up in `hidden`.

        The next step's is the same structure, filled anew.
        """
        num_tokens = hidden.shape[0]
        if num_tokens > self._num_tokens:
            self._make_room(num_tokens, hidden.dtype)
        inputs = (hidden, angles.cos, angles.sin, slot_mapping)
        call = self._filled(num_tokens, [x.data_ptr() for x in inputs], works)
        if outputs is not None:
            call.output_rows, call.output = outputs.rows.data_ptr(), outputs.hidden.data_ptr()
            call.num_outputs = len(outputs.rows)
        return call

    def room_for_steps(self, num_tokens: int, works: list[binding.WindowWork]) -> binding.LayersCall:
        """As `call`, of some steps, whose inputs the C++ makes."""
        if not self._inputs or num_tokens > len(self._inputs[0]):
            first = self._layers[0]
            dtype, half = first.input_norm.weight.dtype, self._call.shape.contents.head_dim // 2
            hidden = torch.empty((num_tokens, packed(first.qkv).num_inputs), dtype=dtype)
            cos, sin = torch.empty((2, num_tokens, 1, half), dtype=dtype)
            self._inputs = [hidden, cos, sin, torch.empty(num_tokens, dtype=torch.int64)]
            self._input_addresses = [x.data_ptr() for x in self._inputs]
        if num_tokens > self._num_tokens:
            self._make_room(num_tokens, self._inputs[0].dtype)
        return self._filled(num_tokens, self._input_addresses, works)

    def _filled(
        self, num_tokens: int, input_addresses: list[int], works: list[binding.WindowWork]
    ) -> binding.LayersCall:
        """All tokens' outputs take the place of their inputs."""
        call = self._call
        self._c_windows[:] = works
        call.hidden, call.cos, call.sin, call.slot_mapping = input_addresses
        call.num_tokens, call.num_threads = num_tokens, torch.get_num_threads()
        call.output_rows, call.output, call.num_outputs = None, call.hidden, num_tokens
        return call

    def _make_room(self, num_tokens: int, dtype: torch.dtype) -> None:
        """It stays: a large step would find its pages one by one, each time."""
        first = self._layers[0]
        widths = packed(first.qkv).num_outputs, packed(first.o).num_inputs, packed(first.down).num_inputs
        num_rows = -(-num_tokens // TILE_HEIGHT) * TILE_HEIGHT
        self._room = [empty_on_huge_pages((num_rows, width), dtype) for width in widths]
        self._call.heads, self._call.attended, self._call.gated = (room.data_ptr() for room in self._room)
        self._num_tokens = num_tokens

    def _structure(self, layer: Layer, kv: LayerKV) -> binding.Layer:
        norms = layer.head_norms
        assert layer.post_norm.epsilon == layer.input_norm.epsilon
        return binding.Layer(
            *(packed(x).structure for x in (layer.qkv, layer.o, layer.gate_up, layer.down)),
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


def packed(linear: object) -> PackedLinear | PackedGatedLinear:
    """The same, as what it is."""
    assert isinstance(linear, PackedLinear | PackedGatedLinear)
    return linear
