"""One step on a CPU: the work lists that its layers share, and the calls that they fill in."""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Angles, AttentionMetadata, Draws, HeadNorms, Layer, LayerKV, Model
from kernels.cpu.binding import Call, RotateCall, StepsCall, WindowWork, Work
from kernels.cpu.draws import PreparedDraws
from kernels.cpu.stack import Outputs, packed
from kernels.work_list import make_work_list, num_steps_alike

if TYPE_CHECKING:
    from kernels.cpu import CpuKernels

# kPartialStep of attention.h
PARTIAL_STEP = 32


class CpuStep:
    """See `kernels.AttentionStep`."""

    def __init__(self, kernels: "CpuKernels", metadata: AttentionMetadata) -> None:
        self._kernels = kernels
        self._native = kernels.native
        self._shape = kernels.shape
        self._metadata = metadata
        self._works: dict[int, _PreparedWork] = {}
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
        num_steps: int,
        draws: Draws | None,
    ) -> torch.Tensor | None:
        """See `kernels.AttentionStep.decode`. One native call, up to where some sequence's work is cut anew."""
        metadata, stack = self._metadata, self._kernels.stack(model.layers, kv)
        if stack.windows == [0]:
            num_steps = min(num_steps, num_steps_alike(metadata.host_context_lens, self._kernels.rule))
        else:
            num_steps = 1  # what a window leaves out grows with each step
        num_positions, vocab_size = len(model.cos), len(model.embedding)
        is_possible = (
            metadata.max_context_len + num_steps - 1 <= num_positions
            and 0 <= input_ids.min() <= input_ids.max() < vocab_size
        )
        if not is_possible:
            return None
        works = [self._prepared(window) for window in stack.windows]
        layers = stack.room_for_steps(len(input_ids), [work.of_window() for work in works])
        choices = torch.ones((1 + num_steps, 2, len(input_ids)), dtype=torch.int64)
        choices[0, 0] = torch.from_numpy(input_ids)
        lm_head = packed(model.lm_head)
        logits = torch.empty((len(input_ids) if draws else 0, lm_head.num_outputs))
        sample = PreparedDraws(logits, draws) if draws else None
        self._native.run_steps(
            StepsCall(
                layers=ctypes.pointer(layers),
                cos=layers.cos,
                sin=layers.sin,
                slot_mapping=layers.slot_mapping,
                kv_ends=works[0].work.kv_ends,
                context_lens=metadata.context_lens.data_ptr(),
                item_seqs=works[0].work.seqs,
                block_tables=metadata.block_tables.data_ptr(),
                embedding=model.embedding.data_ptr(),
                all_cos=model.cos.data_ptr(),
                all_sin=model.sin.data_ptr(),
                lm_head=ctypes.pointer(lm_head.structure),
                norm=model.norm.weight.data_ptr(),
                choices=choices.data_ptr(),
                sample=ctypes.pointer(sample.call) if sample else None,
                logits=logits.data_ptr(),
                table_stride=metadata.block_tables.stride(0),
                num_items=works[0].num_items,
                num_steps=num_steps,
                norm_epsilon=model.norm.epsilon,
            )
        )
        return choices[1:]

    def _prepared(self, sliding_window: int) -> "_PreparedWork":
        if sliding_window not in self._works:
            self._works[sliding_window] = _PreparedWork(self._kernels, self._metadata, sliding_window)
        return self._works[sliding_window]


class _PreparedWork:
    """A work list and all that it points to, and room for the partial results of one layer at a time."""

    def __init__(self, kernels: "CpuKernels", metadata: AttentionMetadata, sliding_window: int) -> None:
        shape = kernels.shape
        items = make_work_list(
            metadata.host_context_lens, metadata.host_query_lens, shape.block_size, sliding_window, kernels.rule
        )
        rows = items.num_partial_rows * shape.num_heads
        sums, norms = torch.empty(rows * -(-shape.head_dim // PARTIAL_STEP) * PARTIAL_STEP), torch.empty(rows * 2)
        is_sharing = (metadata.host_query_lens[items.seqs] == 1) & (sliding_window == 0)
        clusters = kernels.cluster_keepers[sliding_window].of(items, is_sharing, metadata.host_block_tables)
        self.num_items = len(items.seqs)
        self._kept = (items, metadata, clusters, sums, norms)
        self.call = Call(partial_sums=sums.data_ptr(), partial_norms=norms.data_ptr())
        arrays = (items.seqs, items.query_starts, items.num_queries, items.kv_starts, items.kv_ends, items.partials)
        self.work = Work(
            len(clusters.starts) - 1,
            len(items.merge_items),
            metadata.block_tables.stride(0),
            sliding_window,
            torch.get_num_threads(),
            clusters.starts.ctypes.data,
            clusters.order.ctypes.data,
            *(array.ctypes.data for array in arrays),
            items.merge_items.ctypes.data,
            items.merge_counts.ctypes.data,
            metadata.block_tables.data_ptr(),
            metadata.context_lens.data_ptr(),
            metadata.cu_seqlens_q.data_ptr(),
        )

    def of_window(self) -> WindowWork:
        """For all layers with its sliding window."""
        return WindowWork(ctypes.pointer(self.work), self.call.partial_sums, self.call.partial_norms)


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim] such that each token's part is contiguous."""
    if x.dtype != dtype:
        raise TypeError(f"{x.dtype} for kernels of {dtype}")
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
