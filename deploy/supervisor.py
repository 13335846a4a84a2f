"""Keeps the processes of a stack running, and ends them in order.

A child that dies is started again, each time a little later, until it has lived for a while. While the stack starts
the first time, a child that ends with an error of its configuration ends everything.
"""

import asyncio
import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.child import Child
from deploy.errors import DeployError
from deploy.stack import END_SIGNALS, Stack, kill

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
STEADY_S = 10.0  # a child that has lived this long starts from the first backoff again
GRACE_S = 5.0  # between SIGTERM and SIGKILL
MAX_START_DEATHS = 3  # of one child, before the stack was ready once
_CONFIG_EXIT_CODES = frozenset((2, 3))


class Supervisor:
    """`async with Supervisor(stack)`: from then on every child is looked after, until the block ends."""

    def __init__(self, stack: Stack, pids_file: Path | None = None) -> None:
        self.stopping = asyncio.Event()
        """Set by SIGINT, SIGTERM or SIGHUP."""
        self._stack = stack
        self._pids_file = pids_file
        self._ready = False
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers: list[asyncio.Task[None]] = []
        self._down: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in END_SIGNALS:
            loop.add_signal_handler(number, self.stopping.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)  # they were since the stack's start
        self._write_pids()
        self._keepers = [asyncio.create_task(self._keep(child)) for child in self._stack.children.values()]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.log.mute()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._failure.cancel()
        children = dict(self._stack.children)
        redis = [child for name, child in children.items() if name == "redis"]
        await _end([child for name, child in children.items() if name != "redis"])
        await _end(redis)
        if self._pids_file is not None:
            self._pids_file.unlink(missing_ok=True)
        self._stack.clear()

    @property
    def down(self) -> str:
        """Which children are not running, and how they ended; empty when all is well."""
        return ", ".join(f"{name} {_describe(code)}" for name, code in self._down.items())

    async def wait_ready(self, is_serving: "asyncio.Task[None]") -> bool:
        """Waits for the service; False when a signal came first. Raises DeployError where a child can't start."""
        stopping = asyncio.create_task(self.stopping.wait())
        await asyncio.wait((is_serving, stopping, self._failure), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._failure.done():
            self._failure.result()
        if not is_serving.done():
            is_serving.cancel()
            return False
        is_serving.result()
        self._ready = True
        return True

    async def _keep(self, child: Child) -> None:
        name, num_deaths, backoff_s = child.command.name, 0, FIRST_BACKOFF_S
        started = time.monotonic()
        while True:
            code = await _ended(child)
            self._down[name] = code
            num_deaths += 1
            if not self._ready and (code in _CONFIG_EXIT_CODES or num_deaths >= MAX_START_DEATHS):
                self._fail(child, code)
                return
            if time.monotonic() - started > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            self._stack.log.write(f"pagoda: {name} {_describe(code)}, starting it again in {backoff_s:g} s\n")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            child = self._stack.spawn(child.command)
            started = time.monotonic()
            del self._down[name]
            self._write_pids()

    def _fail(self, child: Child, code: int) -> None:
        if not self._failure.done():
            line = child.last_line or f"{child.command.name} {_describe(code)} and said nothing"
            self._failure.set_exception(DeployError(line, code if code > 0 else 1))

    def _write_pids(self) -> None:
        """{"scheduler": 123, ...}, replaced as a whole at each start of a child."""
        if self._pids_file is None:
            return
        pids = {name: child.pid for name, child in self._stack.children.items()}
        fresh = self._pids_file.with_name(self._pids_file.name + ".new")
        fresh.write_text(json.dumps(pids) + "\n")
        fresh.replace(self._pids_file)


async def _end(children: list[Child]) -> None:
    """SIGTERM, and after the grace SIGKILL for those that are left and for what they have started."""
    for child in children:
        child.signal(signal.SIGTERM)
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*map(_ended, children)), GRACE_S)
    kill(children)


async def _ended(child: Child) -> int:
    """Waits for the end of a child; its exit code. A thread each: the loop's pool is smaller than a large stack."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def settle(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def tell(code: int) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, code)

    child.call_at_end(tell)
    return await ended


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
