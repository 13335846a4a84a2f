"""A step's work list for one sliding window, as the C++ wants it."""

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionMetadata
from kernels.clusters import Clusters
from kernels.cpu.binding import Call, WindowWork, Work, address
from kernels.work_list import make_work_list, num_steps_alike

if TYPE_CHECKING:
    from kernels.cpu import CpuKernels

# kPartialStep of attention.h
PARTIAL_STEP = 32
# Of a WorkList, what attention.h's Work points to by the same names.
ARRAYS = ("seqs", "query_starts", "num_queries", "kv_starts", "kv_ends", "partials", "merge_items", "merge_counts")


class PreparedWork:
    """A work list and all that it points to, and room for the partial results of one layer at a time."""

    def __init__(self, kernels: "CpuKernels", metadata: AttentionMetadata, sliding_window: int) -> None:
        shape = kernels.shape
        items = make_work_list(
            metadata.host_context_lens, metadata.host_query_lens, shape.block_size, sliding_window, kernels.rule
        )
        rows = items.num_partial_rows * shape.num_heads
        sums, norms = torch.empty(rows * -(-shape.head_dim // PARTIAL_STEP) * PARTIAL_STEP), torch.empty(rows * 2)
        self._items = items
        self._is_sharing = (metadata.host_query_lens[items.seqs] == 1) & (sliding_window == 0)
        self._keeper = kernels.cluster_keepers[sliding_window]
        self._kept = (sums, norms)
        self.num_items = len(items.seqs)
        self.call = Call(partial_sums=sums.data_ptr(), partial_norms=norms.data_ptr())
        self.work = Work(
            num_merges=len(items.merge_items),
            sliding_window=sliding_window,
            **{name: address(getattr(items, name)) for name in ARRAYS},
        )
        self._clusters: Clusters | None = None
        self._read(metadata)

    def of_window(self) -> WindowWork:
        """For all layers with its sliding window."""
        return WindowWork(ctypes.pointer(self.work), self.call.partial_sums, self.call.partial_norms)

    def _read(self, metadata: AttentionMetadata) -> None:
        """The step's tables and lengths; its items are in place."""
        self._metadata = metadata
        clusters = self._keeper.of(self._items, self._is_sharing, metadata.host_block_tables)
        work = self.work
        if clusters is not self._clusters:
            self._clusters = clusters
            work.num_clusters = len(clusters.starts) - 1
            work.cluster_starts, work.order = address(clusters.starts), address(clusters.order)
        work.num_threads = torch.get_num_threads()
        work.block_tables, work.table_stride = metadata.block_tables.data_ptr(), metadata.block_tables.stride(0)
        work.context_lens, work.cu_seqlens_q = metadata.context_lens.data_ptr(), metadata.cu_seqlens_q.data_ptr()


class DecodesWork(PreparedWork):
    """That of decodes without a sliding window, which grows with them: mostly the step before had as many items."""

    def __init__(self, kernels: "CpuKernels", metadata: AttentionMetadata) -> None:
        super().__init__(kernels, metadata, 0)
        self._context_lens: NDArray[np.int64] = metadata.host_context_lens
        self._last_items = np.flatnonzero(np.diff(self._items.seqs, append=-1))  # one of each sequence
        # From these lengths on, this step and those behind it.
        self.num_steps_alike = num_steps_alike(self._context_lens, kernels.rule)

    def grows_to(self, metadata: AttentionMetadata) -> bool:
        """Whether it serves another step of as many decodes, all of them grown alike: then it does from now on."""
        context_lens = metadata.host_context_lens
        if len(context_lens) != len(self._context_lens):
            return False
        growth = context_lens - self._context_lens
        grown = int(growth[0])
        if not 0 <= grown < self.num_steps_alike or (growth != grown).any():
            return False
        self._context_lens = context_lens
        self.num_steps_alike -= grown
        self._items.kv_ends[self._last_items] = context_lens
        self._read(metadata)
        return True
