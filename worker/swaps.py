"""Swaps between the pools, beside the steps: a thread that copies and reports, in the order of the plans.

They begin once all plans before theirs are done, for a block that comes in may be one that those still read. They are
reported and forgotten: a new owner issues again what Redis holds, and the copies of an earlier one are done by then.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from worker.errors import ProtocolError
from worker.wire import Plan, SwapReport


class Swaps(Protocol):
    """What the executor needs."""

    def check(self, plan: Plan) -> None:
        """Raises ProtocolError where the plan swaps what is not there."""

    def begin(self, plan: Plan) -> None:
        """Start the plan's swaps, behind what was launched before."""

    def settle(self) -> None:
        """Return once none is under way: another owner may use their blocks for anything."""


class NoSwaps:
    """Of a worker without a host pool."""

    def check(self, plan: Plan) -> None:
        """See Swaps."""
        if plan.has_swaps:
            raise ProtocolError(f"plan {plan.step_id} swaps, but this worker has no host pool")

    def begin(self, plan: Plan) -> None:
        """See Swaps."""

    def settle(self) -> None:
        """See Swaps."""


class Copier(Protocol):
    """See `worker.host_pool.Copier`."""

    def mark(self) -> object:
        """Where the device's queue stands now; called by who launches steps."""

    def copy_out(self, block_ids: NDArray[np.int64], host_block_ids: NDArray[np.int64], after: object) -> None:
        """From the KV pool to the host pool, once the device is past that mark; returns when all is written."""

    def copy_in(self, host_block_ids: NDArray[np.int64], block_ids: NDArray[np.int64], after: object) -> None:
        """From the host pool to the KV pool, likewise."""


class Reporter(Protocol):
    """The link."""

    def report_swaps(self, report: SwapReport) -> None:
        """Tell the owner."""

    def guard(self, target: Callable[[], None]) -> None:
        """Run a thread; if it fails, the process ends."""


@dataclass(frozen=True, slots=True)
class _Job:
    plan: Plan
    mark: object


class SwapThread:
    """See Swaps. Of one worker with a host pool."""

    def __init__(self, copier: Copier, num_blocks: int, num_host_blocks: int, reporter: Reporter) -> None:
        self._copier = copier
        self._num_blocks = num_blocks
        self._num_host_blocks = num_host_blocks
        self._reporter = reporter
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_dead = False
        threading.Thread(target=reporter.guard, args=(self._run,), name="swaps", daemon=True).start()

    def check(self, plan: Plan) -> None:
        """See Swaps."""
        for ids, most in (
            (plan.out_block_ids, self._num_blocks),
            (plan.in_block_ids, self._num_blocks),
            (plan.out_host_block_ids, self._num_host_blocks),
            (plan.in_host_block_ids, self._num_host_blocks),
        ):
            if len(ids) and not 0 < ids.min() <= ids.max() <= most:
                raise ProtocolError(f"plan {plan.step_id} swaps blocks {ids.min()} to {ids.max()} of {most}")

    def begin(self, plan: Plan) -> None:
        """See Swaps."""
        if plan.has_swaps:
            with self._changed:
                self._jobs.append(_Job(plan, self._copier.mark()))
                self._changed.notify_all()

    def settle(self) -> None:
        """See Swaps."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._is_dead)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._jobs))
                    job = self._jobs[0]
                self._reporter.report_swaps(self._do(job))
                with self._changed:
                    self._jobs.popleft()
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_dead = True
                self._changed.notify_all()

    def _do(self, job: _Job) -> SwapReport:
        plan, start = job.plan, time.perf_counter()
        if len(plan.out_block_ids):
            self._copier.copy_out(plan.out_block_ids, plan.out_host_block_ids, job.mark)
        if len(plan.in_block_ids):
            self._copier.copy_in(plan.in_host_block_ids, plan.in_block_ids, job.mark)
        seconds = time.perf_counter() - start
        return SwapReport(plan.epoch, plan.out_host_block_ids, plan.in_block_ids, seconds)
