"""Decodes of a model, some steps in one native call: what is the same from call to call is filled in once."""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionMetadata, Draws, LayerKV, Model
from kernels.cpu.binding import StepsCall, address
from kernels.cpu.draws import PreparedDraws
from kernels.cpu.linear import PackedLinear
from kernels.cpu.stack import packed
from kernels.cpu.work import DecodesWork, PreparedWork

if TYPE_CHECKING:
    from kernels.cpu import CpuKernels


class Decoding:
    """Of one model with its KV."""

    def __init__(self, kernels: "CpuKernels", model: Model, kv: Sequence[LayerKV]) -> None:
        self._kernels = kernels
        self._model = model
        self._kv = kv
        self._stack = kernels.stack(model.layers, kv)
        self._work: DecodesWork | None = None  # of the call before
        lm_head = packed(model.lm_head)
        assert isinstance(lm_head, PackedLinear)
        self._num_outputs = lm_head.num_outputs
        self._sketch = lm_head.sketch()
        self._call = StepsCall(
            embedding=model.embedding.data_ptr(),
            all_cos=model.cos.data_ptr(),
            all_sin=model.sin.data_ptr(),
            lm_head=ctypes.pointer(lm_head.structure),
            sketch=None if self._sketch is None else ctypes.pointer(self._sketch.structure),
            norm=model.norm.weight.data_ptr(),
            norm_epsilon=model.norm.epsilon,
        )

    def is_of(self, model: Model, kv: Sequence[LayerKV]) -> bool:
        """Whether it is of these very objects."""
        return self._model is model and self._kv is kv

    def run(
        self,
        metadata: AttentionMetadata,
        input_ids: NDArray[np.int64],
        steps_each: NDArray[np.int64],
        draws: Draws | None,
    ) -> NDArray[np.int64] | None:
        """See `kernels.AttentionStep.decode`. Up to where some sequence's work is cut anew."""
        num_steps = min(int(steps_each[0]), 1 + len(self._model.cos) - metadata.max_context_len)
        if num_steps < 1 or not 0 <= input_ids.min() <= input_ids.max() < len(self._model.embedding):
            return None
        works = self._works(metadata)
        # What a window leaves out grows with each step.
        num_alike = works[0].num_steps_alike if len(works) == 1 and isinstance(works[0], DecodesWork) else 1
        num_steps = min(num_steps, num_alike)
        choices = np.ones((1 + num_steps, 2, len(input_ids)), np.int64)
        choices[0, 0] = input_ids
        self._call.steps_each = address(steps_each)
        self._run(works, choices, draws)
        return choices[1:]

    def _run(self, works: list[PreparedWork], choices: NDArray[np.int64], draws: Draws | None) -> None:
        """choices: as `steps.h` has them, the first given, the others to be filled."""
        call, num_tokens = self._call, choices.shape[2]
        layers = self._stack.room_for_steps(num_tokens, [work.of_window() for work in works])
        call.layers = ctypes.pointer(layers)
        call.cos, call.sin, call.slot_mapping = layers.cos, layers.sin, layers.slot_mapping
        work = works[0].work
        call.kv_ends, call.item_seqs, call.num_items = work.kv_ends, work.seqs, works[0].num_items
        call.context_lens = work.context_lens
        call.block_tables, call.table_stride = work.block_tables, work.table_stride
        call.choices, call.num_steps = address(choices), len(choices) - 1
        call.sample = call.logits = None
        if draws is not None:
            logits = torch.empty((num_tokens, self._num_outputs))
            sample = PreparedDraws(logits, draws)
            call.sample, call.logits = ctypes.pointer(sample.call), logits.data_ptr()
        self._kernels.native.run_steps(call)

    def _works(self, metadata: AttentionMetadata) -> list[PreparedWork]:
        """One for each of the stack's windows."""
        return [
            PreparedWork(self._kernels, metadata, window) if window else self._decodes_work(metadata)
            for window in self._stack.windows
        ]

    def _decodes_work(self, metadata: AttentionMetadata) -> DecodesWork:
        if self._work is None or not self._work.grows_to(metadata):
            self._work = DecodesWork(self._kernels, metadata)
        return self._work
