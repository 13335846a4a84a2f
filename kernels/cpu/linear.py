"""Matrix products over packed weights: see `kernels.Linear` and `kernels.GatedLinear`."""

import ctypes

import torch

from kernels import Norm
from kernels.cpu.binding import LinearCall, LinearWeight, NativeLibrary, Sketch
from kernels.cpu.memory import empty_on_huge_pages

# Input and Output of `linear.h`.
PLAIN, NORMED = range(2)
WRITE, ADD, WRITE_FLOAT, WRITE_GATED, CHOOSE = range(5)
# kTileColumns of `tiles.h`.
TILE_COLUMNS = 16


class _Packed:
    """A matrix as `linear.h` wants it. A row of y is the same, bit by bit, whatever the other rows, and how many."""

    def __init__(
        self, native: NativeLibrary, weight: torch.Tensor, bias: torch.Tensor | None, is_gated: bool = False
    ) -> None:
        assert weight.is_contiguous()
        self._native = native
        self.num_outputs, self.num_inputs = weight.shape
        self._dtype = weight.dtype
        shape = (self.num_outputs, self.num_inputs)
        self._packed = empty_on_huge_pages((native.packed_size(*shape),), weight.dtype)
        self._bias = bias
        native.pack(weight.data_ptr(), self._packed.data_ptr(), *shape, is_gated, torch.get_num_threads())
        self.structure = LinearWeight(
            self._packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.num_inputs,
            self.num_outputs,
        )
        self._call = LinearCall()  # one for all calls: filling it anew would take longer than a small product

    def _run(self, x: torch.Tensor, y: torch.Tensor, before: int, after: int, norm: Norm | None = None) -> torch.Tensor:
        """y, filled."""
        call, (num_rows, width) = self._call, x.shape
        assert width == self.num_inputs
        assert x.dtype == self._dtype
        assert x.is_contiguous()
        assert y.is_contiguous()
        call.input, call.output, call.num_rows = x.data_ptr(), y.data_ptr(), num_rows
        call.input_stride, call.output_stride = width, y.shape[1]
        call.readable_rows = num_rows
        call.input_kind, call.output_kind = before, after
        if norm is not None:
            call.norm_weight, call.norm_epsilon = norm.weight.data_ptr(), norm.epsilon
        call.num_threads = torch.get_num_threads()
        self._native.linear(self.structure, call)
        return y


class LinearSketch:
    """A matrix in 8 bits, by which the highest of a row's outputs is found while few of them are made: see `sketch.h`.

    structure: what the C++ takes; it points into this object.
    """

    def __init__(self, native: NativeLibrary, linear: LinearWeight, num_bytes: int) -> None:
        """num_bytes: as the library says."""
        num_panels = -(-linear.num_outputs // TILE_COLUMNS)
        self._quads = empty_on_huge_pages((num_bytes,), torch.uint8)
        self._steps, self._lengths, self._gaps = map(torch.empty, (num_panels * TILE_COLUMNS, num_panels, num_panels))
        parts = self._quads, self._steps, self._lengths, self._gaps
        self.structure = Sketch(*(part.data_ptr() for part in parts))
        native.sketch(linear, self.structure, torch.get_num_threads())


class PackedLinear(_Packed):
    """See `kernels.Linear`."""

    def sketch(self) -> LinearSketch | None:
        """None where the CPU has no units for it, or the outputs a bias."""
        num_bytes = self._native.sketch_bytes(self.num_outputs, self.num_inputs)
        return LinearSketch(self._native, self.structure, num_bytes) if num_bytes and self._bias is None else None

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.of_normed`."""
        return self._run(x, torch.empty((x.shape[0], self.num_outputs), dtype=self._dtype), NORMED, WRITE, norm)

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.logits`."""
        return self._run(x, torch.empty((x.shape[0], self.num_outputs)), NORMED, WRITE_FLOAT, norm)

    def likeliest(self, x: torch.Tensor, norm: Norm, sketch: LinearSketch | None) -> torch.Tensor:
        """As `kernels.Kernels.greedy` of the logits, none of which are written; with a sketch, few of them are made."""
        self._call.sketch = None if sketch is None else ctypes.pointer(sketch.structure)
        return self._run(x, torch.empty((2, x.shape[0]), dtype=torch.int64), NORMED, CHOOSE, norm)

    def add(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """See `kernels.Linear.add`."""
        self._run(x, total, PLAIN, ADD)


class PackedGatedLinear(_Packed):
    """See `kernels.GatedLinear`."""

    def __init__(self, native: NativeLibrary, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(native, weight, bias, is_gated=True)

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.GatedLinear.of_normed`."""
        y = torch.empty((x.shape[0], self.num_outputs // 2), dtype=self._dtype)
        return self._run(x, y, NORMED, WRITE_GATED, norm)
