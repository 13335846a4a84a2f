"""Steps queued as on a device, without one: plans made ahead of all results, and a runner that lags behind."""

import contextlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pagoda.v1 import worker_pb2 as pb

from tests.unit.worker_harness import Planner
from worker.assemble import Assembly
from worker.batch import Batch
from worker.errors import ProtocolError
from worker.executor import Executor
from worker.ledger import Order
from worker.runner import Runner
from worker.step import Sampled, StepInputs
from worker.swaps import NoSwaps
from worker.wire import Plan, StepOutput, decode_plan

UNKNOWN = -1
"""Stands in a planned sequence for each token that it samples."""


class PlannerAhead(Planner):
    """Never hears of a result."""

    def plan(self, scheduled: dict[int, int], num_steps: int = 1) -> pb.StepPlan:
        message = super().plan(scheduled, num_steps)
        for seq_id, num_tokens in scheduled.items():
            sequence = self.sequences[seq_id]
            sequence.num_computed += num_tokens
            if sequence.num_computed >= sequence.num_tokens:
                sequence.output += [UNKNOWN] * (num_tokens if num_steps > 1 else 1)
        return message


def random_plans(
    planner: PlannerAhead,
    prompts: Sequence[list[int]],
    samplers: Sequence[dict[str, Any]],
    num_output: int,
    rng: random.Random,
) -> list[pb.StepPlan]:
    """Sequences come one by one, run in chunks and in changing company, rest, and go, some of them early."""
    plans = []
    waiting = list(enumerate(zip(prompts, samplers, strict=True)))
    while waiting or planner.sequences:
        while waiting and (not planner.sequences or rng.random() < 0.3):
            seq_id, (prompt, sampler) = waiting.pop(0)
            planner.add(seq_id, prompt, **sampler)
        known = list(planner.sequences.values())
        running = rng.sample(known, rng.randint(max(1, len(known) - 2), len(known)))
        chunk = rng.choice([1, 5, 16, 64])
        scheduled = {s.seq_id: min(chunk, s.num_tokens - s.num_computed) for s in running}
        decode = all(s.num_tokens - s.num_computed == 1 for s in running)
        num_steps = rng.choice([1, 2, 5]) if decode else 1
        if num_steps > 1:
            steps_each = sorted([num_steps, *rng.choices(range(1, num_steps + 1), k=len(running) - 1)], reverse=True)
            scheduled = dict(zip(scheduled, steps_each, strict=True))
        plans.append(planner.plan(scheduled, num_steps))
        for sequence in running:
            if len(sequence.output) >= num_output or rng.random() < 0.02:
                planner.remove(sequence.seq_id)
    return plans


class Script:
    """A PlanSource that has all plans from the start, and lets the executor have the next if `is_there` says so."""

    class Done(Exception):  # noqa: N818
        """All of them have been taken."""

    def __init__(self, plans: Sequence[pb.StepPlan], is_there: Callable[[], bool]) -> None:
        self._orders = deque(Order(decode_plan(plan), "incarnation", 1) for plan in plans)
        self._is_there = is_there
        self.outputs: list[StepOutput] = []
        self.rejected: list[tuple[int, int]] = []  # step id, and how many had been reported

    def take(self) -> Order:
        if not self._orders:
            raise self.Done
        return self._orders.popleft()

    def take_within(self, seconds: float) -> Order | None:
        return self._orders.popleft() if self._orders and self._is_there() else None

    def finish(self, order: Order, output: StepOutput) -> None:
        assert order.plan.step_id == output.step_id
        self.outputs.append(output)

    def reject(self, order: Order, error: ProtocolError) -> None:
        self.rejected.append((order.plan.step_id, len(self.outputs)))


def play(
    plans: Sequence[pb.StepPlan], assembly: Assembly, runner: Runner, is_there: Callable[[], bool] = lambda: True
) -> Script:
    """The script after its end."""
    script = Script(plans, is_there)
    with contextlib.suppress(Script.Done):
        Executor(script, Batch(assembly.limits), runner, NoSwaps()).run()
    return script


class QueueingRunner:
    """What is launched waits in a queue until somebody waits for it; `runner` does it then, in order."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.queue: deque[Callable[[], None]] = deque()
        self.num_fed = 0

    def prepare(self, plan: Plan) -> None:
        self.queue.append(partial(self.runner.prepare, plan))

    def launch(self, inputs: StepInputs) -> "QueuedStep":
        self.num_fed += inputs.is_fed
        step = QueuedStep(self, inputs)
        self.queue.append(step.run)
        return step

    def launch_steps(self, inputs: StepInputs) -> None:
        """One by one."""


class QueuedStep:
    """Leaves its caller free for one look at what comes next."""

    def __init__(self, device: QueueingRunner, inputs: StepInputs) -> None:
        self._device = device
        self._inputs = inputs
        self._looks_s = iter([1.0])
        self._sampled: Sampled | None = None

    def patience_s(self) -> float:
        return next(self._looks_s, 0.0)

    def run(self) -> None:
        self._sampled = self._device.runner.launch(self._inputs).wait()

    def wait(self) -> Sampled:
        while self._sampled is None:
            self._device.queue.popleft()()
        return self._sampled


def rows(output: StepOutput) -> list[object]:
    """All that it says of sequences."""
    columns = (output.attempts, output.num_computed_tokens, output.first_output_indexes, output.num_tokens)
    logprobs = None if output.token_logprobs is None else output.token_logprobs.tolist()
    assert logprobs is None or len(logprobs) == len(output.token_ids)
    return [output.seq_ids, *(c.tolist() for c in columns), output.token_ids.tolist(), logprobs, output.failed_seq_ids]
