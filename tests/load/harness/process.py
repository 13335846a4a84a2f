"""Generators in processes of their own, and their parent's handle on them.

The parent shows progress and asks the server for its counters; what a generator does then is never held up by that.
Messages on the pipe: up: READY, Counts now and then, a Generation at the end, a LoadError; down: when to start, then,
where the run is to end early, STOP.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from tests.load.harness.backend import CallError, connect
from tests.load.harness.errors import LoadError
from tests.load.harness.generator import Counts, Generator
from tests.load.harness.plan import Share, make_plan
from tests.load.harness.records import Generation
from tests.load.harness.settings import Settings
from tests.load.harness.workload import ServedModel

READY, STOP = "ready", "stop"
REPORT_INTERVAL_S = 0.2
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a generator process is to do."""

    settings: Settings
    model: ServedModel
    share: Share
    run_id: str


def generate(job: Job, pipe: "Connection[object, object]") -> None:
    """The process's entry."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says what is to follow
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        asyncio.run(_generate(job, pipe))
    except LoadError as error:
        with suppress(OSError):
            pipe.send(error)
    except (EOFError, OSError):
        pass  # the parent is gone


async def _generate(job: Job, pipe: "Connection[object, object]") -> None:
    plan = make_plan(job.settings, job.model)
    backend = connect(job.settings.target)
    generator = Generator(job.settings, plan, job.share, backend, job.run_id)
    try:
        await backend.model()  # so that no request pays for the connection
        await _warm_up(generator, job.settings.num_warmups)
        pipe.send(READY)
        start_s = await asyncio.to_thread(pipe.recv)
        assert isinstance(start_s, float)
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe.fileno(), _stop, loop, pipe, generator)
        gc.collect()
        gc.freeze()  # a collection in the middle of the run need not walk through what is here already
        reporting = asyncio.create_task(_report(generator, pipe))
        try:
            generation = await generator.run(start_s)
        finally:
            reporting.cancel()
            loop.remove_reader(pipe.fileno())
        pipe.send(generator.counts)
        pipe.send(generation)
    finally:
        await backend.close()


async def _warm_up(generator: Generator, num_requests: int) -> None:
    try:
        await generator.warm_up(num_requests)
    except CallError as error:
        raise LoadError(f"a request to warm up failed: {error}") from None


def _stop(loop: asyncio.AbstractEventLoop, pipe: "Connection[object, object]", generator: Generator) -> None:
    """STOP, or the parent's end."""
    loop.remove_reader(pipe.fileno())
    generator.stop()


async def _report(generator: Generator, pipe: "Connection[object, object]") -> None:
    while True:
        await asyncio.sleep(REPORT_INTERVAL_S)
        pipe.send(generator.counts)


class Crew:
    """All generator processes of one run."""

    def __init__(self, settings: Settings, model: ServedModel, run_id: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection[object, object]] = []
        self._processes = []
        for number in range(settings.num_processes):
            ours, theirs = context.Pipe()
            job = Job(settings, model, Share(number, settings.num_processes), run_id)
            process = context.Process(target=generate, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._counts = [Counts() for _ in self._pipes]
        self._threads = ThreadPoolExecutor(len(self._pipes))  # each waits for one pipe

    async def ready(self) -> None:
        """Returns when all are connected and warm. Raises LoadError where one is not."""
        messages = asyncio.gather(*(self._receive(pipe) for pipe in self._pipes))
        async with asyncio.timeout(START_TIMEOUT_S):
            assert all(message == READY for message in await messages)

    async def run(self, start_s: float, show: Callable[[Counts], None]) -> list[Generation]:
        """Starts all at one moment, and returns when all are done; `show` gets the sum of their counts."""
        for pipe in self._pipes:
            pipe.send(start_s)
        return await asyncio.gather(*(self._follow(number, show) for number in range(len(self._pipes))))

    async def _follow(self, number: int, show: Callable[[Counts], None]) -> Generation:
        while True:
            message = await self._receive(self._pipes[number])
            if isinstance(message, Generation):
                return message
            assert isinstance(message, Counts)
            self._counts[number] = message
            show(_sum(self._counts))

    async def _receive(self, pipe: "Connection[object, object]") -> object:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _receive, pipe)

    def stop(self) -> None:
        """Tells all to end; their generations follow."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(STOP)

    def close(self) -> None:
        """Ends what has not ended by itself."""
        for process in self._processes:
            process.join(END_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._threads.shutdown(cancel_futures=True)


def _receive(pipe: "Connection[object, object]") -> object:
    """The next message. Raises the LoadError that it is, or one where the process is gone."""
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        raise LoadError("a generator process ended before its run did") from None
    if isinstance(message, LoadError):
        raise message
    return message


def _sum(counts: list[Counts]) -> Counts:
    return Counts(
        num_sent=sum(c.num_sent for c in counts),
        num_running=sum(c.num_running for c in counts),
        num_completed=sum(c.num_completed for c in counts),
        num_left=sum(c.num_left for c in counts),
        num_failed=sum(c.num_failed for c in counts),
        num_output_tokens=sum(c.num_output_tokens for c in counts),
        worst_late_s=max(c.worst_late_s for c in counts),
    )
