"""Decode steps as recordings: launched at once, where kernel by kernel takes the host longer than the device.

Owns the buckets (a recording is of a fixed number of sequences), the buffers that recordings read, and the padding up
to a bucket: sequences of one token in the null block, whose hidden states nobody reads. What a recording is, a
`Recorder` knows.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionMetadata, Draws, KernelError
from kernels.cuda.attention import CudaKernels
from kernels.upload import staged, upload
from worker.feed import feed
from worker.forward import Forward
from worker.kv_pool import KVPool
from worker.models.decoder import Decoder
from worker.step import BatchLimits, StepInputs, null_inputs

log = logging.getLogger("pagoda.worker")

# From this many sequences on there is a bucket between a power of two and the next.
FIRST_HALFWAY = 16


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded. replay: does it again, at the same addresses; output: what it computes, each time anew."""

    replay: Callable[[], None]
    output: torch.Tensor


class Recorder(Protocol):
    """Where recordings come from."""

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        """Of what `run` enqueues, which may be run several times. Raises RuntimeError and KernelError."""


class CudaGraphRecorder:
    """See Recorder. CUDA graphs, in one pool of memory: no two of them are replayed at once."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        """See Recorder."""
        run()  # compiles, uploads and allocates what must not be a part of the graph
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                output = run()
        finally:
            torch.cuda.set_stream(stream)  # where the capture could not be ended, torch leaves its own
        return Recording(graph.replay, output)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64 ... and `max_num_seqs`: from 16 on, at most a third is padding."""
    powers = [2**i for i in range(max_num_seqs.bit_length())]
    halfway = [power * 3 // 2 for power in powers if power >= FIRST_HALFWAY]
    return sorted({size for size in (*powers, *halfway, max_num_seqs) if size <= max_num_seqs})


class DecodeBuffers:
    """What recordings read; a bucket has the first rows. cu_seqlens_q never changes: each sequence has one token."""

    def __init__(self, limits: BatchLimits, device: torch.device) -> None:
        num_seqs, max_blocks = limits.max_num_seqs, -(-limits.max_model_len // limits.block_size)
        # input_ids, positions and slot_mapping of a bucket, one after the other.
        self.columns = torch.zeros(3 * num_seqs, dtype=torch.int64, device=device)
        self.context_lens = torch.ones(num_seqs, dtype=torch.int32, device=device)
        self.cu_seqlens_q = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((num_seqs, max_blocks), dtype=torch.int32, device=device)


class DecodeBucket:
    """The steps of up to `num_seqs` sequences with one query token each."""

    def __init__(self, num_seqs: int, buffers: DecodeBuffers, kernels: CudaKernels, max_model_len: int) -> None:
        self._num_seqs = num_seqs
        self._columns = buffers.columns[: 3 * num_seqs].view(3, num_seqs)
        inputs = null_inputs(num_seqs, 1)
        self._metadata = AttentionMetadata(
            block_tables=buffers.block_tables[:num_seqs],
            context_lens=buffers.context_lens[:num_seqs],
            cu_seqlens_q=buffers.cu_seqlens_q[: num_seqs + 1],
            slot_mapping=self._columns[2],
            host_block_tables=inputs.block_tables,
            host_context_lens=inputs.context_lens,
            host_query_lens=inputs.query_lens,
        )
        self._attention = kernels.prepare_captured(self._metadata, max_model_len)
        self._fill(inputs)

    def record(self, decoder: Decoder, pool: KVPool, recorder: Recorder) -> None:
        """Once, before any replay; it runs sequences in the null block."""
        input_ids, positions, _ = self._columns
        self._recording = recorder.record(lambda: decoder.hidden(input_ids, positions, self._attention, pool.layers))

    def replay(self, inputs: StepInputs, last: torch.Tensor) -> torch.Tensor:
        """Hidden states of the step, then of the padding: [num_seqs, hidden_size]. last: as in `worker.feed`."""
        self._fill(inputs)
        if inputs.is_fed:
            input_ids = self._columns[0]
            input_ids.copy_(feed(input_ids, last))
        self._recording.replay()
        return self._recording.output

    def _fill(self, inputs: StepInputs) -> None:
        """Overwrite what the recording reads, padded, once the device has done with the replay before."""
        num_seqs = len(inputs.query_lens)
        columns = np.zeros(self._columns.shape, np.int64)
        columns[:, :num_seqs] = inputs.input_ids, inputs.positions, inputs.slot_mapping
        context_lens = np.ones(self._num_seqs, np.int64)
        context_lens[:num_seqs] = inputs.context_lens
        tables = np.zeros((self._num_seqs, inputs.block_tables.shape[1]), np.int32)
        tables[:num_seqs] = inputs.block_tables
        self._copy(columns, self._columns)
        self._copy(context_lens.astype(np.int32), self._metadata.context_lens)
        self._copy(tables, self._metadata.block_tables[:, : tables.shape[1]])
        self._attention.refresh(self._attention.cut(context_lens, tables))

    def _copy(self, array: NDArray[np.int64] | NDArray[np.int32], buffer: torch.Tensor) -> None:
        buffer.copy_(staged(array, buffer.device), non_blocking=True)


class GraphForward:
    """See Forward. Steps of one query token per sequence are replayed; others, and what has no recording, are eager."""

    def __init__(self, eager: Forward, limits: BatchLimits) -> None:
        self._eager = eager
        self._limits = limits
        self._buckets: list[tuple[int, DecodeBucket]] = []

    @torch.inference_mode()
    def record(self, decoder: Decoder, kernels: CudaKernels, pool: KVPool, recorder: Recorder) -> None:
        """All buckets, the largest first: the others fit into its memory. The first that fails ends it, but for want of
        memory, which the next may not need."""
        start = time.perf_counter()
        buffers = DecodeBuffers(self._limits, pool.blocks.device)
        for num_seqs in reversed(bucket_sizes(self._limits.max_num_seqs)):
            try:
                bucket = DecodeBucket(num_seqs, buffers, kernels, self._limits.max_model_len)
                bucket.record(decoder, pool, recorder)
            except torch.OutOfMemoryError as error:
                log.warning("no graph of decode steps of %d sequences, which are slower so: %s", num_seqs, error)
                continue
            except (RuntimeError, KernelError) as error:
                log.warning(
                    "no graph of decode steps of %d sequences or fewer, which are slower so: %s", num_seqs, error
                )
                break
            self._buckets.insert(0, (num_seqs, bucket))
        log.info("recorded %d sizes of decode steps in %.2f s", len(self._buckets), time.perf_counter() - start)

    def decode(self, inputs: StepInputs, draws: Draws | None) -> None:
        """See Forward: a graph for each step."""

    def hidden(self, inputs: StepInputs, last: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        bucket = self._bucket(inputs)
        if bucket is None:
            return self._eager.hidden(inputs, last)
        hidden = bucket.replay(inputs, last)
        return hidden if inputs.samples_all else hidden[upload(inputs.logit_rows, hidden.device)]

    def _bucket(self, inputs: StepInputs) -> DecodeBucket | None:
        num_seqs = len(inputs.query_lens)
        at = bisect_left(self._buckets, num_seqs, key=lambda bucket: bucket[0])
        is_recorded = len(inputs.input_ids) == num_seqs and num_seqs > 0 and at < len(self._buckets)
        return self._buckets[at][1] if is_recorded else None
