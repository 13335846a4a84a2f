"""Runs steps of a real model: one forward, then sampling."""

import time
from collections.abc import Callable

import numpy as np
import torch

from kernels import BlockCopy, Kernels
from kernels.upload import upload
from worker.feed import taint
from worker.forward import Forward
from worker.kv_pool import KVPool
from worker.models.decoder import Decoder
from worker.runner import RunningStep
from worker.sampler import Choices, choose, draws_of, is_plain, to_sampled
from worker.step import Sampled, SampledSteps, StepInputs, null_inputs
from worker.wire import Plan

# A prompt long enough to tell what a token takes.
LONG_STEP_S = 0.05
# Of a step that has no choices.
NOTHING = torch.zeros((2, 0), dtype=torch.int64)


class ModelRunner:
    """See `worker.runner.Runner`."""

    def __init__(self, decoder: Decoder, kernels: Kernels, pool: KVPool, forward: Forward) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._pool = pool
        self._forward = forward
        self._is_on_gpu = pool.blocks.device.type != "cpu"
        self._last = NOTHING  # the last step's choices, which feed the next

    def prepare(self, plan: Plan) -> None:
        """Copy the plan's blocks."""
        if plan.copies:
            self._kernels.copy_blocks(self._pool.blocks, [BlockCopy(*copy) for copy in plan.copies])

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See Runner."""
        if self._is_on_gpu:
            return EnqueuedStep(self._enqueue(inputs))
        return DeferredStep(lambda: to_sampled(self._enqueue(inputs)))

    def launch_steps(self, inputs: StepInputs) -> "DeferredStep | None":
        """See Runner. On a CPU, of sequences that ask for tokens and nothing else."""
        is_decode = len(inputs.input_ids) and inputs.samples_all and not inputs.is_fed
        if self._is_on_gpu or not is_decode or not is_plain(inputs.sampled):
            return None
        return DeferredStep(lambda: self._decode(inputs))

    @torch.inference_mode()
    def _decode(self, inputs: StepInputs) -> Sampled | SampledSteps:
        choices = self._forward.decode(inputs, draws_of(inputs.sampled, int(inputs.steps_each[0])))
        if choices is None:
            return to_sampled(self._enqueue(inputs))
        self._last = NOTHING  # these steps are committed before others are built: none is fed with theirs
        token_ids, is_finite = choices.swapaxes(0, 1)
        return SampledSteps(token_ids, is_finite.astype(np.bool_), inputs.steps_each)

    @torch.inference_mode()
    def _enqueue(self, inputs: StepInputs) -> Choices:
        """The step's choices; on a GPU they are still being computed."""
        if not len(inputs.input_ids):
            self._last = NOTHING
            return Choices(NOTHING)
        device, last = self._pool.blocks.device, self._last
        hidden = self._forward.hidden(inputs, last)
        if len(hidden) > len(inputs.logit_rows):
            hidden = hidden[: len(inputs.logit_rows)]
        choices = choose(self._decoder.logits(hidden), inputs.sampled, self._kernels)
        self._last = choices.tokens
        if inputs.is_fed:
            taint(self._last, upload(inputs.input_ids[inputs.logit_rows], device), last)
        return choices


class EnqueuedStep:
    """A step in the GPU's queue; see RunningStep."""

    # Between two looks at the queue: short beside a step, long beside a look.
    LOOK_S = 200e-6

    def __init__(self, choices: Choices) -> None:
        # Copied now: asked for at the end, it would come behind the steps that are launched until then.
        self._choices = choices.to_host()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def patience_s(self) -> float:
        """See RunningStep."""
        return 0.0 if self._done.query() else self.LOOK_S  # type: ignore[no-untyped-call]

    def wait(self) -> Sampled:
        """See RunningStep."""
        self._done.synchronize()
        return to_sampled(self._choices)


class DeferredStep:
    """A step on the CPU, or some: it needs the cores itself, so it runs when it is waited for. See RunningStep."""

    def __init__(self, run: Callable[[], Sampled | SampledSteps]) -> None:
        self._run = run

    def patience_s(self) -> float:
        """See RunningStep."""
        return 0.0

    def wait(self) -> Sampled | SampledSteps:
        """See RunningStep."""
        return self._run()


class PoisoningRunner:
    """A ModelRunner whose pool holds NaN wherever nothing has been written: what reads it shows in the logits."""

    def __init__(self, runner: ModelRunner, pool: KVPool) -> None:
        self._runner = runner
        self._pool = pool
        self._joined: dict[int, tuple[int, int]] = {}  # seq_id -> blocks it has, tokens computed when it joined
        pool.poison()

    def prepare(self, plan: Plan) -> None:
        """Poison freed blocks and the unwritten slots of new ones, then copy the plan's blocks."""
        for block_id in plan.freed_block_ids:
            self._pool.poison_block(block_id, 0)
        for seq_id in plan.removed_seq_ids:
            self._joined.pop(seq_id, None)
        for added in plan.added:
            self._joined[added.seq_id] = (0, added.num_computed_tokens)
            self._poison_new(added.seq_id, added.block_ids.tolist())
        ends = np.cumsum(plan.appended_num_blocks)
        for seq_id, block_ids in zip(plan.appended_seq_ids, np.split(plan.appended_block_ids, ends), strict=False):
            self._poison_new(seq_id, block_ids.tolist())
        self._runner.prepare(plan)

    def _poison_new(self, seq_id: int, block_ids: list[int]) -> None:
        """Blocks at the end of a table; a fork's first ones hold what its parent has computed."""
        num_blocks, num_computed = self._joined[seq_id]
        block_size = self._pool.kv_format.block_size
        for i, block_id in enumerate(block_ids, start=num_blocks):
            num_written = num_computed - i * block_size
            if num_written < block_size:
                self._pool.poison_block(block_id, max(0, num_written))
        self._joined[seq_id] = (num_blocks + len(block_ids), num_computed)

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See Runner."""
        return self._runner.launch(inputs)

    def launch_steps(self, inputs: StepInputs) -> RunningStep | None:
        """See Runner."""
        return self._runner.launch_steps(inputs)


def warm_up(runner: ModelRunner, block_size: int) -> float:
    """Run a prompt of one block, then single tokens, in the null block; seconds that the fastest of those took.

    What the kernels make when they first meet a prompt or a decode is there when the first request comes.
    """
    runner.launch(null_inputs(1, block_size)).wait()
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        decode = null_inputs(1, 1)
        (runner.launch_steps(decode) or runner.launch(decode)).wait()
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def prefill_s_per_token(runner: ModelRunner, block_size: int, max_num_tokens: int) -> float:
    """Seconds that one token more of a prompt adds to a step, from steps in the null block that take ever longer.

    Each is run twice: a GPU loads kernels when it first meets a size.
    """
    num_blocks, first_s, step_s = 1, 0.0, 0.0
    while step_s < LONG_STEP_S and num_blocks * block_size <= max_num_tokens:
        for _ in range(2):
            start = time.perf_counter()
            runner.launch(null_inputs(num_blocks, block_size)).wait()
            step_s = time.perf_counter() - start
        first_s = first_s or step_s
        num_blocks *= 2
    return max(0.0, step_s - first_s) / max(1, (num_blocks // 2 - 1) * block_size)


def profile(runner: ModelRunner, max_num_batched_tokens: int, block_size: int, device: torch.device) -> int:
    """Bytes that a step of `max_num_batched_tokens` takes on a CUDA `device` beside weights and pool."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.launch(null_inputs(max(1, max_num_batched_tokens // block_size), block_size)).wait()
    return int(torch.cuda.max_memory_allocated(device) - before)
