"""`kernels.Kernels` on CUDA, or on its emulation: tensors to arguments, variants to libraries.

Owns the scratch memory of split sequences and the loaded libraries. One instance serves one stream at a time: two
launches under way at once would share scratch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels import AttentionMetadata, AttentionShape, BlockCopy, Draws
from kernels.cuda.library import BlockCopyArgs, GreedyArgs, KernelLibrary
from kernels.cuda.linear import CudaGatedLinear, CudaLinear
from kernels.cuda.step import CudaStep
from kernels.cuda.variant import Variant
from kernels.kv_format import KVFormat
from kernels.sampling import sample
from kernels.upload import upload

# KV tokens of a partition, and partitions of a sequence at most (longer ones have longer partitions).
PARTITION_LEN = 256
MAX_PARTITIONS = 64


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
    """See SplitRule."""

    partition_len: int = PARTITION_LEN
    max_partitions: int = MAX_PARTITIONS


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

    def prepare(self, metadata: AttentionMetadata) -> CudaStep:
        """See `kernels.Kernels.prepare`."""
        return CudaStep(self, metadata, 0)

    def prepare_captured(self, metadata: AttentionMetadata, max_context_len: int) -> CudaStep:
        """A step whose launches a CUDA graph may hold, to be replayed after `CudaStep.refresh`.

        One query token per sequence, contexts of at most `max_context_len`. Attend once before the capture: that
        compiles, and uploads the work.
        """
        assert metadata.max_query_len == 1
        longest = min(self.tuning.max_partitions, -(-max_context_len // self.tuning.partition_len))
        max_items = longest * len(metadata.host_context_lens)
        self.scratch.reserve(max_items)
        return CudaStep(self, metadata, max_items)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CudaLinear:
        """See `kernels.Kernels.linear`."""
        assert weight.dtype == self.shape.dtype
        return CudaLinear(self.library(has_window=False), self.backend.current_stream, weight, bias)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CudaGatedLinear:
        """See `kernels.Kernels.gated`."""
        linear = self.linear(weight, bias)
        return CudaGatedLinear(self.library(has_window=False), self.backend.current_stream, linear)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """See `kernels.Kernels.greedy`."""
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        num_rows, vocab_size = logits.shape
        choices = torch.empty((2, num_rows), dtype=torch.int64, device=logits.device)
        self.library(has_window=False).greedy(
            GreedyArgs(
                logits=logits.data_ptr(),
                choices=choices.data_ptr(),
                stream=self.backend.current_stream(),
                num_rows=num_rows,
                vocab_size=vocab_size,
            )
        )
        return choices

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
        items = upload(rows, self.device)
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
        kv_dtype = shape.kv_dtype if self.kv_format.is_scaled else None
        variant = Variant(shape.dtype, shape.head_dim, shape.block_size, has_window, shape.soft_cap > 0, kv_dtype)
        if variant not in self._libraries:
            self._libraries[variant] = self.backend.open_library(variant)
        return self._libraries[variant]


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
