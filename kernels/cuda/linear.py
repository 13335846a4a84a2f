"""Matrix products by cuBLAS, through torch, between our own norms and gates: see `kernels.Linear`, `GatedLinear`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import Norm
from kernels.cuda.library import GateArgs, KernelLibrary, NormArgs
from kernels.cuda.variant import CHUNK_BYTES


class CudaLinear:
    """See `kernels.Linear`. What comes before a product is one kernel, rounded once; what it is added to costs none."""

    def __init__(
        self,
        library: KernelLibrary,
        current_stream: Callable[[], int],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self._library = library
        self._current_stream = current_stream
        self._weight = weight
        self._bias = bias

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.of_normed`."""
        _check_rows(x, self._weight)
        normed = torch.empty_like(x)
        self._library.norm(
            NormArgs(
                x=x.data_ptr(),
                weight=norm.weight.data_ptr(),
                y=normed.data_ptr(),
                stream=self._current_stream(),
                num_rows=x.shape[0],
                size=x.shape[1],
                epsilon=norm.epsilon,
            )
        )
        return F.linear(normed, self._weight, self._bias)

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.logits`."""
        return self.of_normed(x, norm).float()

    def add(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """See `kernels.Linear.add`."""
        if self._bias is not None:
            total += self._bias
        total.addmm_(x, self._weight.t())


class CudaGatedLinear:
    """See `kernels.GatedLinear`. The gate is a kernel of its own behind the product."""

    def __init__(self, library: KernelLibrary, current_stream: Callable[[], int], gate_up: CudaLinear) -> None:
        self._library = library
        self._current_stream = current_stream
        self._gate_up = gate_up

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.GatedLinear.of_normed`."""
        gate_up = self._gate_up.of_normed(x, norm)
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        gated = gate_up.new_empty((num_rows, size))
        self._library.gate(
            GateArgs(
                gate_up=gate_up.data_ptr(),
                y=gated.data_ptr(),
                stream=self._current_stream(),
                num_rows=num_rows,
                size=size,
            )
        )
        return gated


def _check_rows(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Rows of whole chunks are read by chunks."""
    assert x.dtype == weight.dtype
    assert x.is_contiguous()
    assert x.data_ptr() % CHUNK_BYTES == 0 or weight.shape[1] * weight.element_size() % CHUNK_BYTES
