"""One step on a CPU: the work lists that its layers share, and the calls that they fill in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Angles, AttentionMetadata, Draws, HeadNorms, Layer, LayerKV, Model
from kernels.cpu.binding import RotateCall
from kernels.cpu.stack import Outputs
from kernels.cpu.work import PreparedWork

if TYPE_CHECKING:
    from kernels.cpu import CpuKernels


class CpuStep:
    """See `kernels.AttentionStep`."""

    def __init__(self, kernels: "CpuKernels", metadata: AttentionMetadata) -> None:
        self._kernels = kernels
        self._native = kernels.native
        self._shape = kernels.shape
        self._metadata = metadata
        self._works: dict[int, PreparedWork] = {}
        # Filled anew for each layer, in part: a small step is done sooner than a call is built.
        self._rotate_call = RotateCall(
            slot_mapping=metadata.slot_mapping.data_ptr(), num_threads=torch.get_num_threads()
        )

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.rotate_and_write`. The queries are a part of `heads`."""
        heads = _rows(heads, self._shape.dtype)
        call = self._rotate_call
        call.heads, call.heads_stride, call.num_tokens = heads.data_ptr(), heads.stride(0), heads.shape[0]
        call.cos, call.sin = angles.cos.data_ptr(), angles.sin.data_ptr()
        call.keys, call.values = layer.keys.data_ptr(), layer.values.data_ptr()
        call.query_norm = call.key_norm = None
        if norms is not None:
            call.query_norm, call.key_norm = norms.query.data_ptr(), norms.key.data_ptr()
            call.norm_epsilon = norms.epsilon
        self._native.rotate_and_write(self._kernels.c_shape, call)
        return heads[:, : self._shape.num_heads]

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See `kernels.AttentionStep.attend`."""
        prepared = self._prepared(sliding_window)
        rows = _rows(query, self._shape.dtype)
        output = torch.empty(query.shape, dtype=query.dtype)
        call = prepared.call
        call.query, call.query_stride, call.output = rows.data_ptr(), rows.stride(0), output.data_ptr()
        call.keys, call.values = layer.keys.data_ptr(), layer.values.data_ptr()
        self._native.attend(self._kernels.c_shape, prepared.work, call)
        return output

    def run_layers(
        self,
        layers: Sequence[Layer],
        kv: Sequence[LayerKV],
        hidden: torch.Tensor,
        angles: Angles,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.run_layers`. One native call."""
        if not layers:
            return hidden if rows is None else hidden[rows]
        assert hidden.is_contiguous()
        stack = self._kernels.stack(layers, kv)
        works = [self._prepared(window).of_window() for window in stack.windows]
        outputs = None if rows is None else Outputs(rows, hidden.new_empty(len(rows), hidden.shape[1]))
        self._native.run_layers(stack.call(hidden, angles, self._metadata.slot_mapping, works, outputs))
        return hidden if outputs is None else outputs.hidden

    def decode(
        self,
        model: Model,
        kv: Sequence[LayerKV],
        input_ids: NDArray[np.int64],
        steps_each: NDArray[np.int64],
        draws: Draws | None,
    ) -> NDArray[np.int64] | None:
        """See `kernels.AttentionStep.decode`."""
        return self._kernels.decoding(model, kv).run(self._metadata, input_ids, steps_each, draws)

    def _prepared(self, sliding_window: int) -> PreparedWork:
        if sliding_window not in self._works:
            self._works[sliding_window] = PreparedWork(self._kernels, self._metadata, sliding_window)
        return self._works[sliding_window]


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim] such that each token's part is contiguous."""
    if x.dtype != dtype:
        raise TypeError(f"{x.dtype} for kernels of {dtype}")
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
