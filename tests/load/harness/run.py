"""One run from start to end: generators started at one moment, the server's counters read beside them."""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from tests.load.harness.backend import Backend, ServerSample
from tests.load.harness.generator import Counts
from tests.load.harness.process import Crew
from tests.load.harness.records import Generation, Record
from tests.load.harness.settings import Settings
from tests.load.harness.workload import ServedModel

LEAD_S = 0.2
"""From the word to the moment of the start."""
SETTLE_TIMEOUT_S = 10.0
"""How long the server may take to be idle after the last request, before its last counters are taken as they are."""
_POLL_S = 0.05
Show = Callable[[Counts, ServerSample | None, float], None]
"""Counts, the server's last sample, seconds since the start."""


@dataclass(frozen=True, slots=True)
class RawRun:
    """Everything that was measured; times of the monotonic clock."""

    settings: Settings
    model: ServedModel
    started_at_s: float
    """Unix time."""
    start_s: float
    generations: list[Generation]
    samples: list[ServerSample]
    """The server's counters before, during and after; empty where it has none."""

    @property
    def records(self) -> list[Record]:
        """Of all processes, by due time."""
        return sorted((r for g in self.generations for r in g.records), key=lambda r: (r.due_s, r.index))

    @property
    def is_interrupted(self) -> bool:
        """Whether it was ended before its time."""
        return any(generation.is_interrupted for generation in self.generations)


class Interrupt:
    """Ctrl-C, once: the run ends early, and what was measured is reported."""

    def __init__(self) -> None:
        self.is_set = False
        self._crew: Crew | None = None

    def follow(self, crew: Crew) -> None:
        """Whose run it ends."""
        self._crew = crew

    def __call__(self) -> None:
        self.is_set = True
        if self._crew is not None:
            self._crew.stop()


async def run_once(
    settings: Settings, backend: Backend, model: ServedModel, show: Show, interrupt: Interrupt
) -> RawRun:
    """Runs the plan of the settings. Raises LoadError where it can't be run."""
    crew = await asyncio.to_thread(Crew, settings, model, f"load-{uuid.uuid4().hex[:12]}")
    try:
        await crew.ready()
        interrupt.follow(crew)
        watch = ServerWatch(backend, settings.status_interval_s)
        await watch.look()
        started_at_s, start_s = time.time() + LEAD_S, time.monotonic() + LEAD_S
        watching = asyncio.create_task(watch.run())
        try:
            generations = await crew.run(start_s, lambda c: show(c, watch.last, time.monotonic() - start_s))
        finally:
            watching.cancel()
        await watch.settle()
    finally:
        await asyncio.to_thread(crew.close)
    return RawRun(settings, model, started_at_s, start_s, generations, watch.samples)


class ServerWatch:
    """Reads the server's counters again and again."""

    def __init__(self, backend: Backend, interval_s: float) -> None:
        self.samples: list[ServerSample] = []
        self._backend = backend
        self._interval_s = interval_s

    @property
    def last(self) -> ServerSample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    async def look(self) -> None:
        """One more sample, if the server answers."""
        sample = await self._backend.sample()
        if sample is not None:
            self.samples.append(sample)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def settle(self) -> None:
        """Waits until the server has noticed the last end, or the last client that left."""
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        await self.look()
        while self.last is not None and self.last.num_live_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
            sample = await self._backend.sample()
            if sample is not None:
                self.samples[-1] = sample  # only the last of these counts
