"""Matrix products over packed weights: see `kernels.Linear`."""

from enum import IntEnum

import torch

from kernels import Norm
from kernels.cpu.binding import ELEMENT_TYPES, LinearCall, LinearWeight, NativeLibrary
from kernels.cpu.memory import empty_on_huge_pages


class Input(IntEnum):
    """See `linear.h`."""

    PLAIN = 0
    NORMED = 1
    GATED = 2


class Output(IntEnum):
    """See `linear.h`."""

    WRITE = 0
    ADD = 1
    WRITE_FLOAT = 2


class PackedLinear:
    """See `kernels.Linear`. A row of y is the same, bit by bit, whatever the other rows are, and how many."""

    def __init__(self, native: NativeLibrary, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert weight.is_contiguous()
        self._native = native
        self._num_outputs, self._num_inputs = weight.shape
        self._dtype = weight.dtype
        panels = -(-self._num_outputs // native.panel_size)
        self._packed = empty_on_huge_pages((panels * native.panel_size * self._num_inputs,), weight.dtype)
        self._bias = bias
        shape = (self._num_outputs, self._num_inputs)
        native.pack(weight.data_ptr(), self._packed.data_ptr(), *shape, weight.element_size(), torch.get_num_threads())
        self._weight = LinearWeight(
            self._packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self._num_inputs,
            self._num_outputs,
            ELEMENT_TYPES[weight.dtype],
        )

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.of_normed`."""
        y = torch.empty((x.shape[0], self._num_outputs), dtype=self._dtype)
        self._run(x, y, Input.NORMED, Output.WRITE, norm)
        return y

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.logits`."""
        y = torch.empty((x.shape[0], self._num_outputs), dtype=torch.float32)
        self._run(x, y, Input.NORMED, Output.WRITE_FLOAT, norm)
        return y

    def add(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """See `kernels.Linear.add`."""
        self._run(x, total, Input.PLAIN, Output.ADD)

    def add_gated(self, gate_up: torch.Tensor, total: torch.Tensor) -> None:
        """See `kernels.Linear.add_gated`."""
        self._run(gate_up, total, Input.GATED, Output.ADD)

    def _run(self, x: torch.Tensor, y: torch.Tensor, before: Input, after: Output, norm: Norm | None = None) -> None:
        width = self._num_inputs * (2 if before is Input.GATED else 1)
        assert x.dtype == self._dtype
        assert x.shape == (y.shape[0], width)
        assert x.stride(1) == y.stride(1) == 1
        self._native.linear(
            self._weight,
            LinearCall(
                x.data_ptr(),
                norm.weight.data_ptr() if norm else None,
                y.data_ptr(),
                x.stride(0),
                y.stride(0),
                x.shape[0],
                norm.epsilon if norm else 0.0,
                before,
                after,
                torch.get_num_threads(),
            ),
        )
