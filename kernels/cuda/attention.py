"""`kernels.Kernels` on CUDA, or on its emulation: tensors to arguments, variants to libraries, steps to launches.

Owns the scratch memory of split sequences and the loaded libraries. One instance serves one stream at a time: two
launches under way at once would share scratch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Angles, AttentionMetadata, AttentionShape, BlockCopy, Draws, HeadNorms, Layer, LayerKV
from kernels.cuda.library import AttentionArgs, BlockCopyArgs, KernelLibrary, RotateArgs
from kernels.cuda.variant import Variant
from kernels.cuda.work import ITEM_FIELDS, PackedWork, pack_work
from kernels.kv_format import KVFormat
from kernels.layers import run_layers
from kernels.reference import ReferenceLinear, greedy
from kernels.sampling import sample
from kernels.work_list import SplitRule, make_work_list

# KV tokens of a partition, and partitions of a sequence at most (longer ones have longer partitions).
PARTITION_LEN = 256
MAX_PARTITIONS = 64
CHUNK_BYTES = 16


@dataclass(frozen=True, slots=True)
class Backend:
    """Where kernels come from and run.

    open_library: compiles a variant, or finds it, and loads it; called once per variant. current_stream: the handle
    of the stream that launches go to.
    """

    open_library: Callable[[Variant], KernelLibrary]
    current_stream: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Tuning:
    """soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 leaves them. The rest as in SplitRule."""

    partition_len: int = PARTITION_LEN
    max_partitions: int = MAX_PARTITIONS
    soft_cap: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A step's work for one window. values: PackedWork.values on the device, and room for more."""

    library: KernelLibrary
    packed: PackedWork
    values: torch.Tensor


class Scratch:
    """Partial results of split sequences, and counters of those that have arrived.

    Grows by doubling. What it has outgrown it keeps: a captured graph may still write there.
    """

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        self._device = device
        self._shape = shape
        self._kept: list[torch.Tensor] = []
        self._grow(0)

    def reserve(self, num_rows: int) -> None:
        """Room for `num_rows` rows of partial results. What was reserved before is lost."""
        if num_rows > self.arrivals.shape[0]:
            self._grow(max(num_rows, 2 * self.arrivals.shape[0]))

    def _grow(self, num_rows: int) -> None:
        shape = self._shape
        self.sums = torch.empty((num_rows, shape.num_heads, shape.head_dim), dtype=torch.float32, device=self._device)
        self.stats = torch.empty((num_rows, shape.num_heads, 2), dtype=torch.float32, device=self._device)
        self.arrivals = torch.zeros((num_rows, shape.num_kv_heads), dtype=torch.int32, device=self._device)
        self._kept += [self.sums, self.stats, self.arrivals]


class CudaKernels:
    """See `kernels.Kernels`."""

    def __init__(self, device: torch.device, shape: AttentionShape, backend: Backend, tuning: Tuning) -> None:
        self.device = device
        self.shape = shape
        self.backend = backend
        self.tuning = tuning
        self.scratch = Scratch(device, shape)
        self._libraries: dict[Variant, KernelLibrary] = {}
        self.kv_format = KVFormat(
            shape.kv_dtype, shape.num_kv_heads, shape.head_dim, shape.block_size, key_group=shape.head_dim
        )

    def prepare(self, metadata: AttentionMetadata) -> "CudaStep":
        """See `kernels.Kernels.prepare`."""
        return CudaStep(self, metadata, 0)

    def prepare_captured(self, metadata: AttentionMetadata, max_context_len: int) -> "CudaStep":
        """A step whose launches a CUDA graph may hold, to be replayed after `CudaStep.refresh`.

        One query token per sequence, contexts of at most `max_context_len`. Attend once before the capture: that
        compiles, and uploads the work.
        """
        assert metadata.max_query_len == 1
        longest = min(self.tuning.max_partitions, -(-max_context_len // self.tuning.partition_len))
        max_items = longest * len(metadata.host_context_lens)
        self.scratch.reserve(max_items)
        return CudaStep(self, metadata, max_items)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ReferenceLinear:
        """See `kernels.Kernels.linear`."""
        return ReferenceLinear(weight, bias)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """See `kernels.Kernels.greedy`."""
        return greedy(logits)

    def sample(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """See `kernels.Kernels.sample`."""
        return sample(logits, draws)

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        """See `kernels.Kernels.copy_blocks`: one launch for each run of copies that do not depend on each other."""
        if not copies:
            return
        assert pool.is_contiguous()
        library = self.library(has_window=False)
        rows = np.array([(copy.src_block_id, copy.dst_block_id, copy.num_tokens) for copy in copies], np.int32)
        items = torch.from_numpy(rows).to(self.device, non_blocking=True)
        for start, end in independent_runs(copies):
            library.copy_blocks(
                BlockCopyArgs(
                    pool=pool.data_ptr(),
                    copies=items[start:].data_ptr(),
                    stream=self.backend.current_stream(),
                    num_blocks=pool.shape[2],
                    num_copies=end - start,
                    num_planes=pool.shape[0] * pool.shape[1],
                    num_kv_heads=pool.shape[3],
                )
            )

    def library(self, has_window: bool) -> KernelLibrary:
        """The variant, compiled now if it never was. Raises BuildError."""
        shape = self.shape
        variant = Variant(shape.dtype, shape.head_dim, shape.block_size, has_window, self.tuning.soft_cap > 0)
        if variant not in self._libraries:
            self._libraries[variant] = self.backend.open_library(variant)
        return self._libraries[variant]


class CudaStep:
    """See `kernels.AttentionStep`."""

    def __init__(self, kernels: CudaKernels, metadata: AttentionMetadata, max_items: int) -> None:
        assert metadata.block_tables.stride(1) == 1
        self._kernels = kernels
        self._metadata = metadata
        self._max_items = max_items
        self._work: dict[int, DeviceWork] = {}

    def refresh(self, host_context_lens: NDArray[np.int64]) -> None:
        """Before a graph that holds this step's launches is replayed: the work of other lengths, at the same addresses.

        For a step from `prepare_captured`. The metadata's tensors are the caller's to overwrite.
        """
        self._metadata = dataclasses.replace(self._metadata, host_context_lens=host_context_lens)
        for sliding_window, work in self._work.items():
            packed = self._cut(work.library, sliding_window)
            assert packed.num_units == work.packed.num_units, "the grid is captured too"
            work.values[: len(packed.values)].copy_(torch.from_numpy(packed.values), non_blocking=True)

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

    def run_layers(self, layers: Sequence[Layer], kv: Sequence[LayerKV], hidden: torch.Tensor, angles: Angles) -> None:
        """See `kernels.AttentionStep.run_layers`."""
        run_layers(self, layers, kv, hidden, angles)

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See `kernels.AttentionStep.attend`."""
        assert query.dtype == self._kernels.shape.dtype
        query = _with_chunked_tokens(query)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if sliding_window not in self._work:
            library = self._kernels.library(has_window=sliding_window > 0)
            self._work[sliding_window] = self._upload(library, self._cut(library, sliding_window))
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
                soft_cap=self._kernels.tuning.soft_cap,
            )
        )
        return out

    def _cut(self, library: KernelLibrary, sliding_window: int) -> PackedWork:
        shape, tuning, facts = self._kernels.shape, self._kernels.tuning, library.facts
        group_size = shape.num_heads // shape.num_kv_heads
        max_decode_queries = facts.decode_rows // group_size
        rule = SplitRule(
            query_tile=facts.prefill_rows // group_size,
            partition_len=tuning.partition_len,
            max_partitions=tuning.max_partitions,
            max_split_queries=max_decode_queries,
        )
        metadata = self._metadata
        work = make_work_list(
            metadata.host_context_lens, metadata.host_query_lens, shape.block_size, sliding_window, rule
        )
        num_units = max(1, facts.decode_blocks // shape.num_kv_heads)
        return pack_work(work, max_decode_queries, num_units)

    def _upload(self, library: KernelLibrary, packed: PackedWork) -> DeviceWork:
        num_values = max(len(packed.values), packed.decode_offset + self._max_items * ITEM_FIELDS)
        values = torch.empty(num_values, dtype=torch.int32, device=self._kernels.device)
        values[: len(packed.values)].copy_(torch.from_numpy(packed.values), non_blocking=True)
        return DeviceWork(library, packed, values)


def independent_runs(copies: Sequence[BlockCopy]) -> list[tuple[int, int]]:
    """Ranges of `copies` in which none reads or writes what another of the range writes: usually one."""
    runs, start = [], 0
    read: set[int] = set()
    written: set[int] = set()
    for i, copy in enumerate(copies):
        if copy.src_block_id in written or copy.dst_block_id in written or copy.dst_block_id in read:
            runs.append((start, i))
            start = i
            read, written = set(), set()
        read.add(copy.src_block_id)
        written.add(copy.dst_block_id)
    return [*runs, (start, len(copies))]


def _with_chunked_tokens(heads: torch.Tensor) -> torch.Tensor:
    """`heads` [num_tokens, heads, head_dim], or a copy of it, with each token contiguous and in whole chunks."""
    element_bytes = heads.element_size()
    is_dense = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    is_aligned = heads.data_ptr() % CHUNK_BYTES == 0 and heads.stride(0) * element_bytes % CHUNK_BYTES == 0
    return heads if is_dense and is_aligned else heads.contiguous()
