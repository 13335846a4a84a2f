"""One step on CUDA: the work that its layers share, and the launches."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Angles, AttentionMetadata, HeadNorms, LayerKV
from kernels.clusters import make_clusters
from kernels.cuda.library import AttentionArgs, KernelLibrary, RotateArgs
from kernels.cuda.variant import CHUNK_BYTES
from kernels.cuda.work import DECODE_FIELDS, PackedWork, pack_work
from kernels.layers import UnfusedStep
from kernels.upload import staged
from kernels.work_list import SplitRule, make_work_list

if TYPE_CHECKING:
    from kernels.cuda.attention import CudaKernels


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A step's work for one window. values: PackedWork.values on the device, and room for more."""

    library: KernelLibrary
    packed: PackedWork
    values: torch.Tensor


class CudaStep(UnfusedStep):
    """See `kernels.AttentionStep`."""

    def __init__(self, kernels: "CudaKernels", metadata: AttentionMetadata, max_items: int) -> None:
        assert metadata.block_tables.stride(1) == 1
        self._kernels = kernels
        self._metadata = metadata
        self._max_items = max_items
        self._work: dict[int, DeviceWork] = {}

    def cut(
        self, host_context_lens: NDArray[np.int64], host_block_tables: NDArray[np.int32]
    ) -> Mapping[int, PackedWork]:
        """Other sequences' work by window, for `refresh`; the device may be busy with this step meanwhile."""
        metadata = dataclasses.replace(
            self._metadata, host_context_lens=host_context_lens, host_block_tables=host_block_tables
        )
        return {window: self._cut(work.library, metadata, window) for window, work in self._work.items()}

    def refresh(self, cut: Mapping[int, PackedWork]) -> None:
        """Before a graph that holds this step's launches is replayed: what `cut` made, at the same addresses.

        For a step from `prepare_captured`. The metadata's tensors are the caller's to overwrite.
        """
        for sliding_window, packed in cut.items():
            work = self._work[sliding_window]
            assert packed.num_units == work.packed.num_units, "the grid is captured too"
            work.values[: len(packed.values)].copy_(staged(packed.values, self._kernels.device), non_blocking=True)

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.rotate_and_write`. One pass; arithmetic is float32, rounded once."""
        shape, slots = self._kernels.shape, self._metadata.slot_mapping
        heads = _with_chunked_tokens(heads)
        assert angles.cos.is_contiguous()
        assert angles.sin.is_contiguous()
        query = torch.empty((slots.shape[0], shape.num_heads, shape.head_dim), dtype=heads.dtype, device=heads.device)
        self._kernels.library(has_window=False).rotate(
            RotateArgs(
                heads=heads.data_ptr(),
                cos=angles.cos.data_ptr(),
                sin=angles.sin.data_ptr(),
                query_norm=norms.query.data_ptr() if norms else None,
                key_norm=norms.key.data_ptr() if norms else None,
                query=query.data_ptr(),
                keys=layer.keys.data_ptr(),
                values=layer.values.data_ptr(),
                slot_mapping=slots.data_ptr(),
                stream=self._kernels.backend.current_stream(),
                heads_stride=heads.stride(0),
                num_tokens=slots.shape[0],
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                norm_epsilon=norms.epsilon if norms else 0.0,
            )
        )
        return query

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See `kernels.AttentionStep.attend`."""
        assert query.dtype == self._kernels.shape.dtype
        query = _with_chunked_tokens(query)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if sliding_window not in self._work:
            library = self._kernels.library(has_window=sliding_window > 0)
            self._work[sliding_window] = self._upload(library, self._cut(library, self._metadata, sliding_window))
        work = self._work[sliding_window]
        shape, metadata, packed = self._kernels.shape, self._metadata, work.packed
        scratch = self._kernels.scratch
        scratch.reserve(packed.num_partial_rows)
        work.library.attend(
            AttentionArgs(
                query=query.data_ptr(),
                out=out.data_ptr(),
                keys=layer.keys.data_ptr(),
                values=layer.values.data_ptr(),
                block_tables=metadata.block_tables.data_ptr(),
                context_lens=metadata.context_lens.data_ptr(),
                cu_seqlens_q=metadata.cu_seqlens_q.data_ptr(),
                decode_items=work.values[packed.decode_offset :].data_ptr(),
                unit_starts=work.values.data_ptr(),
                prefill_items=work.values[packed.prefill_offset :].data_ptr(),
                partial_sums=scratch.sums.data_ptr(),
                partial_stats=scratch.stats.data_ptr(),
                arrivals=scratch.arrivals.data_ptr(),
                stream=self._kernels.backend.current_stream(),
                query_stride=query.stride(0),
                block_table_stride=metadata.block_tables.stride(0),
                num_units=packed.num_units,
                num_prefill_items=packed.num_prefill_items,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                sliding_window=sliding_window,
                scale=shape.scale,
                soft_cap=shape.soft_cap,
            )
        )
        return out

    def _cut(self, library: KernelLibrary, metadata: AttentionMetadata, sliding_window: int) -> PackedWork:
        shape, tuning, facts = self._kernels.shape, self._kernels.tuning, library.facts
        group_size = shape.num_heads // shape.num_kv_heads
        max_decode_queries = facts.decode_rows // group_size
        rule = SplitRule(
            query_tile=facts.prefill_rows // group_size,
            partition_len=tuning.partition_len,
            max_partitions=tuning.max_partitions,
            max_split_queries=max_decode_queries,
        )
        work = make_work_list(
            metadata.host_context_lens, metadata.host_query_lens, shape.block_size, sliding_window, rule
        )
        # A cluster's items have one query token each; windows of different sequences end at different tokens.
        is_sharing = (metadata.host_query_lens[work.seqs] == 1) & (sliding_window == 0) & (max_decode_queries > 1)
        clusters = make_clusters(
            work, is_sharing, metadata.host_block_tables, shape.block_size, max_items=max_decode_queries
        )
        num_units = max(1, facts.decode_blocks // shape.num_kv_heads)
        return pack_work(work, clusters, max_decode_queries, num_units)

    def _upload(self, library: KernelLibrary, packed: PackedWork) -> DeviceWork:
        num_values = max(len(packed.values), packed.decode_offset + self._max_items * DECODE_FIELDS)
        values = torch.empty(num_values, dtype=torch.int32, device=self._kernels.device)
        values[: len(packed.values)].copy_(staged(packed.values, self._kernels.device), non_blocking=True)
        return DeviceWork(library, packed, values)


def _with_chunked_tokens(heads: torch.Tensor) -> torch.Tensor:
    """`heads` [num_tokens, heads, head_dim], or a copy of it, with each token contiguous and in whole chunks."""
    element_bytes = heads.element_size()
    is_dense = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    is_aligned = heads.data_ptr() % CHUNK_BYTES == 0 and heads.stride(0) * element_bytes % CHUNK_BYTES == 0
    return heads if is_dense and is_aligned else heads.contiguous()
