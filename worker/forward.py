"""A step's tokens through the model's layers: batch columns to tensors, tensors to hidden states."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionMetadata, AttentionStep, Draws, Kernels
from kernels.upload import upload
from worker.feed import feed
from worker.kv_pool import KVPool
from worker.models.decoder import Decoder
from worker.step import StepInputs


class Forward(Protocol):
    """How the layers of a step are run."""

    def hidden(self, inputs: StepInputs, last: torch.Tensor) -> torch.Tensor:
        """Write the step's KV; the hidden states of its logit_rows: [num_samples or more, hidden_size].

        last: as in `worker.feed`. The next call may overwrite what this one returns.
        """

    def decode(self, inputs: StepInputs, draws: Draws | None) -> NDArray[np.int64] | None:
        """See `kernels.AttentionStep.decode`. inputs: of the first step, nothing of which is fed."""


class EagerForward:
    """See Forward. Any step, operation by operation."""

    def __init__(self, decoder: Decoder, kernels: Kernels, pool: KVPool) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._pool = pool
        self._undone: tuple[StepInputs, AttentionStep] | None = None  # what kernels were asked to decode, and did not

    def hidden(self, inputs: StepInputs, last: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        attention = self._prepare(inputs)
        input_ids, positions = self._upload(inputs.input_ids), self._upload(inputs.positions)
        if inputs.is_fed:
            input_ids = feed(input_ids, last)
        rows = None if inputs.samples_all else self._upload(inputs.logit_rows)
        return self._decoder.hidden(input_ids, positions, attention, self._pool.layers, rows)

    def decode(self, inputs: StepInputs, draws: Draws | None) -> NDArray[np.int64] | None:
        """See Forward."""
        attention = self._prepare(inputs)
        choices = self._decoder.decode(inputs.input_ids, attention, self._pool.layers, inputs.steps_each, draws)
        if choices is None:
            self._undone = inputs, attention
        return choices

    def _prepare(self, inputs: StepInputs) -> AttentionStep:
        undone, self._undone = self._undone, None
        if undone is not None and undone[0] is inputs:
            return undone[1]
        return self._kernels.prepare(self._metadata(inputs))

    def _metadata(self, inputs: StepInputs) -> AttentionMetadata:
        return AttentionMetadata(
            block_tables=self._upload(inputs.block_tables),
            context_lens=self._upload(inputs.context_lens.astype(np.int32)),
            cu_seqlens_q=self._upload(inputs.cu_seqlens_q),
            slot_mapping=self._upload(inputs.slot_mapping),
            host_block_tables=inputs.block_tables,
            host_context_lens=inputs.context_lens,
            host_query_lens=inputs.query_lens,
        )

    def _upload(self, array: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return upload(array, self._pool.blocks.device)
