"""The kernels for CPUs, in C++: see `kernels.Kernels`.

Owns what the C++ is called with. Its threads are torch's own (one OpenMP pool serves both), as many as
`torch.get_num_threads()` says.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from kernels import Angles, AttentionMetadata, AttentionShape, BlockCopy, HeadNorms, Layer, LayerKV
from kernels.build import shared_library
from kernels.clusters import make_clusters
from kernels.cpu.binding import ELEMENT_TYPES, Call, LayersCall, NativeLibrary, RotateCall, Shape, WindowWork, Work
from kernels.cpu.linear import PackedLinear
from kernels.cpu.stack import LayerStack
from kernels.cpu.targets import Target, library, runnable_targets
from kernels.work_list import SplitRule, make_work_list

MAX_HEAD_DIM = 256
# Rows (query tokens times heads of a group) that unpacked keys and values serve: fewer unpack too often, more
# outgrow the L2 cache.
TILE_ROWS = 192
PARTITION_LEN = 256
MAX_PARTITIONS = 64
# kPartialStep of attention.h
PARTIAL_STEP = 32


class UnsupportedShapeError(ValueError):
    """The kernels don't cover this shape; the message says what of it."""


class CpuKernels:
    """See `kernels.Kernels`. Raises UnsupportedShapeError and BuildError."""

    def __init__(self, shape: AttentionShape, target: Target | None = None) -> None:
        if shape.head_dim > MAX_HEAD_DIM:
            raise UnsupportedShapeError(f"head_dim {shape.head_dim} is above {MAX_HEAD_DIM}")
        if shape.block_size not in (16, 32, 64, 128):
            raise UnsupportedShapeError(f"block_size {shape.block_size} is none of 16, 32, 64, 128")
        self.native = NativeLibrary(shared_library(library(target or runnable_targets()[0])))
        self.shape = shape
        self._stack: LayerStack | None = None
        group_size = shape.num_heads // shape.num_kv_heads
        self.rule = SplitRule(
            query_tile=max(1, TILE_ROWS // group_size),
            partition_len=PARTITION_LEN,
            max_partitions=MAX_PARTITIONS,
            max_split_queries=1,
            split_tails=False,
        )

    def prepare(self, metadata: AttentionMetadata) -> "CpuStep":
        """Work lists for a step."""
        return CpuStep(self, metadata)

    def stack(self, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> LayerStack:
        """The layers as the C++ wants them, made when they are first met."""
        if self._stack is None or not self._stack.is_of(layers, kv):
            self._stack = LayerStack(layers, kv)
        return self._stack

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See `kernels.Kernels.linear`."""
        return PackedLinear(self.native, weight, bias)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """See `kernels.Kernels.greedy`."""
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        choices = torch.empty((2, logits.shape[0]), dtype=torch.int64)
        self.native.greedy(logits.data_ptr(), choices.data_ptr(), *logits.shape, torch.get_num_threads())
        return choices

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        """See `kernels.Kernels.copy_blocks`."""
        rows = np.array([(copy.src_block_id, copy.dst_block_id, copy.num_tokens) for copy in copies], np.int64)
        self.native.copy_blocks(
            _c_shape(self.shape, pool.dtype),
            pool.data_ptr(),
            pool.shape[0] * pool.shape[1],
            pool.shape[2],
            rows.ctypes.data,
            len(rows),
            pool.element_size(),
            torch.get_num_threads(),
        )


class CpuStep:
    """See `kernels.AttentionStep`."""

    def __init__(self, kernels: CpuKernels, metadata: AttentionMetadata) -> None:
        self._kernels = kernels
        self._native = kernels.native
        self._shape = kernels.shape
        self._metadata = metadata
        self._works: dict[int, _PreparedWork] = {}
        self._c_shapes: dict[torch.dtype, Shape] = {}
        # Filled anew for each layer, in part: a small step is done sooner than a call is built.
        self._rotate_call = RotateCall(
            slot_mapping=metadata.slot_mapping.data_ptr(), num_threads=torch.get_num_threads()
        )

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.rotate_and_write`. The queries are a part of `heads`."""
        heads = _rows(heads, layer.keys.dtype)
        call = self._rotate_call
        call.heads, call.heads_stride, call.num_tokens = heads.data_ptr(), heads.stride(0), heads.shape[0]
        call.cos, call.sin = angles.cos.data_ptr(), angles.sin.data_ptr()
        call.keys, call.values = layer.keys.data_ptr(), layer.values.data_ptr()
        call.query_norm = call.key_norm = None
        if norms is not None:
            call.query_norm, call.key_norm = norms.query.data_ptr(), norms.key.data_ptr()
            call.norm_epsilon = norms.epsilon
        self._native.rotate_and_write(self._c_shape(layer.keys.dtype), call)
        return heads[:, : self._shape.num_heads]

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See `kernels.AttentionStep.attend`."""
        prepared = self._prepared(sliding_window)
        rows = _rows(query, layer.keys.dtype)
        output = torch.empty(query.shape, dtype=query.dtype)
        call = prepared.call
        call.query, call.query_stride, call.output = rows.data_ptr(), rows.stride(0), output.data_ptr()
        call.keys, call.values = layer.keys.data_ptr(), layer.values.data_ptr()
        self._native.attend(self._c_shape(layer.keys.dtype), prepared.work, call)
        return output

    def run_layers(self, layers: Sequence[Layer], kv: Sequence[LayerKV], hidden: torch.Tensor, angles: Angles) -> None:
        """See `kernels.AttentionStep.run_layers`. One native call."""
        if not layers:
            return
        assert hidden.is_contiguous()
        stack = self._kernels.stack(layers, kv)
        works = [self._prepared(window) for window in stack.windows]
        windows = [WindowWork(ctypes.pointer(w.work), w.call.partial_sums, w.call.partial_norms) for w in works]
        scratch = stack.scratch(hidden)
        call = LayersCall(
            ctypes.pointer(self._c_shape(hidden.dtype)),
            stack.c_layers,
            (WindowWork * len(windows))(*windows),
            hidden.data_ptr(),
            *(tensor.data_ptr() for tensor in scratch),
            angles.cos.data_ptr(),
            angles.sin.data_ptr(),
            self._metadata.slot_mapping.data_ptr(),
            hidden.shape[0],
            len(stack),
            torch.get_num_threads(),
        )
        self._native.run_layers(call)

    def _prepared(self, sliding_window: int) -> "_PreparedWork":
        if sliding_window not in self._works:
            rule = self._kernels.rule
            self._works[sliding_window] = _PreparedWork(self._shape, rule, self._metadata, sliding_window)
        return self._works[sliding_window]

    def _c_shape(self, dtype: torch.dtype) -> Shape:
        if dtype not in self._c_shapes:
            self._c_shapes[dtype] = _c_shape(self._shape, dtype)
        return self._c_shapes[dtype]


class _PreparedWork:
    """A work list and all that it points to, and room for the partial results of one layer at a time."""

    def __init__(
        self, shape: AttentionShape, rule: SplitRule, metadata: AttentionMetadata, sliding_window: int
    ) -> None:
        items = make_work_list(
            metadata.host_context_lens, metadata.host_query_lens, shape.block_size, sliding_window, rule
        )
        rows = items.num_partial_rows * shape.num_heads
        sums, norms = torch.empty(rows * -(-shape.head_dim // PARTIAL_STEP) * PARTIAL_STEP), torch.empty(rows * 2)
        clusters = make_clusters(
            items,
            (metadata.host_query_lens[items.seqs] == 1) & (sliding_window == 0),
            metadata.block_tables.numpy(),
            shape.block_size,
        )
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


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim] such that each token's part is contiguous."""
    if x.dtype != dtype:
        raise TypeError(f"{x.dtype} beside a KV pool of {dtype}")
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()


def _c_shape(shape: AttentionShape, dtype: torch.dtype) -> Shape:
    if dtype not in ELEMENT_TYPES:
        raise TypeError(f"a KV pool of {dtype}: the CPU kernels know {', '.join(map(str, ELEMENT_TYPES))}")
    return Shape(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size, ELEMENT_TYPES[dtype], shape.scale
    )
