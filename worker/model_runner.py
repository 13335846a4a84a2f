"""Runs steps of a real model: batch columns to tensors, one forward, sampling."""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionMetadata, BlockCopy, Kernels
from worker.kv_pool import KVPool
from worker.models.decoder import Decoder, TokenBatch
from worker.runner import RunningStep
from worker.sampler import choose, to_sampled
from worker.step import SEQUENCE, Sampled, SampledRows, Scheduled, StepInputs
from worker.wire import Plan


class ModelRunner:
    """See `worker.runner.Runner`."""

    def __init__(self, decoder: Decoder, kernels: Kernels, pool: KVPool) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._pool = pool
        self._is_on_gpu = pool.blocks.device.type != "cpu"

    def prepare(self, plan: Plan) -> None:
        """Copy the plan's blocks."""
        if plan.copies:
            self._kernels.copy_blocks(self._pool.blocks, [BlockCopy(*copy) for copy in plan.copies])

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See Runner."""
        return EnqueuedStep(self._enqueue(inputs)) if self._is_on_gpu else DeferredStep(self._enqueue, inputs)

    @torch.inference_mode()
    def _enqueue(self, inputs: StepInputs) -> torch.Tensor:
        """The step's choices, as `choose` returns them; on a GPU they are still being computed."""
        if not len(inputs.input_ids):
            return torch.zeros((2, 0), dtype=torch.int64)
        logits = self._decoder.forward(
            TokenBatch(self._upload(inputs.input_ids), self._upload(inputs.positions), self._upload(inputs.logit_rows)),
            self._kernels.prepare(self._metadata(inputs)),
            self._pool.layers,
        )
        return choose(logits, inputs.sampled, self._kernels)

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
        return torch.from_numpy(array).to(self._pool.blocks.device, non_blocking=True)


class EnqueuedStep:
    """A step in the GPU's queue; see RunningStep."""

    # Between two looks at the queue: short beside a step, long beside a look.
    LOOK_S = 200e-6

    def __init__(self, choices: torch.Tensor) -> None:
        self._choices = choices
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def patience_s(self) -> float:
        """See RunningStep."""
        return 0.0 if self._done.query() else self.LOOK_S  # type: ignore[no-untyped-call]

    def wait(self) -> Sampled:
        """See RunningStep."""
        return to_sampled(self._choices)


class DeferredStep:
    """A step on the CPU: it needs the cores itself, so it runs when it is waited for. See RunningStep."""

    def __init__(self, enqueue: Callable[[StepInputs], torch.Tensor], inputs: StepInputs) -> None:
        self._enqueue = enqueue
        self._inputs = inputs

    def patience_s(self) -> float:
        """See RunningStep."""
        return 0.0

    def wait(self) -> Sampled:
        """See RunningStep."""
        return to_sampled(self._enqueue(self._inputs))


class PoisoningRunner:
    """A ModelRunner whose pool holds NaN wherever nothing has been written: what reads it shows in the logits."""

    def __init__(self, runner: ModelRunner, pool: KVPool) -> None:
        self._runner = runner
        self._pool = pool
        pool.poison()

    def prepare(self, plan: Plan) -> None:
        """Poison freed blocks and the unwritten slots of new ones, then copy the plan's blocks."""
        for block_id in (*plan.freed_block_ids, *plan.appended_block_ids.tolist()):
            self._pool.poison_block(block_id, 0)
        for added in plan.added:
            full, offset = divmod(added.num_computed_tokens, self._pool.kv_format.block_size)
            for i, block_id in enumerate(added.block_ids[full:].tolist()):
                self._pool.poison_block(block_id, offset if i == 0 else 0)
        self._runner.prepare(plan)

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See Runner."""
        return self._runner.launch(inputs)


def warm_up(runner: ModelRunner, block_size: int) -> float:
    """Run a prompt of one block, then single tokens, in the null block; seconds that the fastest of those took."""
    runner.launch(_null_inputs(1, block_size)).wait()
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        runner.launch(_null_inputs(1, 1)).wait()
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def profile(runner: ModelRunner, max_num_batched_tokens: int, block_size: int, device: torch.device) -> int:
    """Bytes that a step of `max_num_batched_tokens` takes on a CUDA `device` beside weights and pool."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.launch(_null_inputs(max(1, max_num_batched_tokens // block_size), block_size)).wait()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _null_inputs(num_seqs: int, query_len: int) -> StepInputs:
    """A step of `num_seqs` sequences with `query_len` tokens each, all in the null block, sampled greedily."""
    tokens = np.zeros(num_seqs * query_len, np.int64)
    lens = np.full(num_seqs, query_len, np.int64)
    seqs = np.arange(num_seqs)
    none, none32 = np.zeros(num_seqs, np.int64), np.zeros(num_seqs, np.float32)
    return StepInputs(
        input_ids=tokens,
        id_places=tokens,
        positions=tokens,
        slot_mapping=np.tile(np.arange(query_len, dtype=np.int64), num_seqs),
        cu_seqlens_q=(np.arange(num_seqs + 1) * query_len).astype(np.int32),
        query_lens=lens,
        context_lens=lens,
        block_tables=np.zeros((num_seqs, 1), np.int32),
        logit_rows=(seqs + 1) * query_len - 1,
        sampled=SampledRows(none32, none, none32, none32, none.astype(np.uint64), none, ()),
        scheduled=Scheduled(seqs, np.zeros(num_seqs, SEQUENCE), lens, seqs, seqs, seqs),
    )
