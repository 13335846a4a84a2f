"""The kernels for CPUs, in C++: see `kernels.Kernels`.

Owns what the C++ is called with. Its threads are its own (`team.h`), as many as `torch.get_num_threads()` says; torch's
sleep meanwhile.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from kernels import AttentionMetadata, AttentionShape, BlockCopy, Draws, Layer, LayerKV, Model
from kernels.build import best_library
from kernels.clusters import ClusterKeeper
from kernels.cpu.binding import NativeLibrary, address, c_shape
from kernels.cpu.decoding import Decoding
from kernels.cpu.draws import PreparedDraws
from kernels.cpu.linear import PackedGatedLinear, PackedLinear
from kernels.cpu.stack import LayerStack
from kernels.cpu.step import CpuStep
from kernels.cpu.targets import Target, library, runnable_targets
from kernels.kv_format import LARGEST, KVFormat
from kernels.work_list import SplitRule

MAX_HEAD_DIM = 256
# Rows (query tokens times heads of a group) that unpacked keys and values serve: fewer unpack too often, more
# outgrow the L2 cache.
TILE_ROWS = 192
PARTITION_LEN = 256
MAX_PARTITIONS = 64
# Items of a cluster at most: enough to make reading cheap, few enough to share a long prefix out to many threads.
MAX_CLUSTER_ITEMS = 32


class UnsupportedShapeError(ValueError):
    """The kernels don't cover this shape; the message says what of it."""


class CpuKernels:
    """See `kernels.Kernels`. Raises UnsupportedShapeError and BuildError."""

    def __init__(self, shape: AttentionShape, target: Target | None = None) -> None:
        """Without a target: for the best instruction set that this machine runs and the compiler knows."""
        _check(shape)
        targets = runnable_targets() if target is None else (target,)
        libraries = [library(t, shape.dtype, shape.kv_dtype, shape.soft_cap > 0) for t in targets]
        self.native = NativeLibrary(best_library(libraries))
        self.shape = shape
        self.c_shape = c_shape(shape)
        self.kv_format = KVFormat(
            *(shape.kv_dtype, shape.num_kv_heads, shape.head_dim, shape.block_size),
            *(self.native.key_group, self.native.value_group),
        )
        self._stack: LayerStack | None = None
        self._decoding: Decoding | None = None
        # By sliding window.
        self.cluster_keepers = defaultdict[int, ClusterKeeper](
            lambda: ClusterKeeper(shape.block_size, MAX_CLUSTER_ITEMS)
        )
        group_size = shape.num_heads // shape.num_kv_heads
        self.rule = SplitRule(
            query_tile=max(1, TILE_ROWS // group_size),
            partition_len=PARTITION_LEN,
            max_partitions=MAX_PARTITIONS,
            max_split_queries=1,
            split_tails=False,
        )

    def prepare(self, metadata: AttentionMetadata) -> CpuStep:
        """Work lists for a step."""
        return CpuStep(self, metadata)

    def stack(self, layers: Sequence[Layer], kv: Sequence[LayerKV]) -> LayerStack:
        """The layers as the C++ wants them, made when they are first met."""
        if self._stack is None or not self._stack.is_of(layers, kv):
            self._stack = LayerStack(self.c_shape, layers, kv)
        return self._stack

    def decoding(self, model: Model, kv: Sequence[LayerKV]) -> Decoding:
        """Decodes of a model, laid out when it is first met."""
        if self._decoding is None or not self._decoding.is_of(model, kv):
            self._decoding = Decoding(self, model, kv)
        return self._decoding

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See `kernels.Kernels.linear`."""
        assert weight.dtype == self.shape.dtype
        return PackedLinear(self.native, weight, bias)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedGatedLinear:
        """See `kernels.Kernels.gated`."""
        assert weight.dtype == self.shape.dtype
        return PackedGatedLinear(self.native, weight, bias)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """See `kernels.Kernels.greedy`."""
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        choices = torch.empty((2, logits.shape[0]), dtype=torch.int64)
        sizes = choices.stride(0), *logits.shape
        self.native.greedy(logits.data_ptr(), choices.data_ptr(), *sizes, torch.get_num_threads())
        return choices

    def sample(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """See `kernels.Kernels.sample`."""
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        prepared = PreparedDraws(logits, draws)
        self.native.sample(prepared.call)
        return prepared.token_ids

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        """See `kernels.Kernels.copy_blocks`."""
        rows = np.array([(copy.src_block_id, copy.dst_block_id, copy.num_tokens) for copy in copies], np.int64)
        self.native.copy_blocks(
            self.c_shape,
            pool.data_ptr(),
            pool.shape[0],
            pool.shape[2],
            address(rows),
            len(rows),
            torch.get_num_threads(),
        )


def _check(shape: AttentionShape) -> None:
    if shape.head_dim > MAX_HEAD_DIM or shape.head_dim % 2:
        raise UnsupportedShapeError(f"head_dim {shape.head_dim} is odd, or above {MAX_HEAD_DIM}")
    if shape.block_size not in (16, 32, 64, 128):
        raise UnsupportedShapeError(f"block_size {shape.block_size} is none of 16, 32, 64, 128")
    if shape.kv_dtype != shape.dtype and shape.kv_dtype not in LARGEST:
        raise UnsupportedShapeError(f"KV of {shape.kv_dtype} beside {shape.dtype}")
