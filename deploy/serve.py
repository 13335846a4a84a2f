"""`pagoda up` and `pagoda run`: a started stack, its supervisor, and what is done with it until a signal comes."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from deploy.errors import DeployError
from deploy.settings import UpSettings
from deploy.stack import Stack
from deploy.supervisor import Supervisor

if TYPE_CHECKING:
    from scheduler.client import PagodaClient

_POLL_S = 0.02
_LIVE = 1  # WorkerState.WORKER_STATE_LIVE; the contract is imported late


def serve(stack: Stack, settings: UpSettings) -> None:
    """Serves until a signal comes. Raises DeployError where it can't, or where a child was down at the end."""
    asyncio.run(_serve(stack, settings))


def serve_for(stack: Stack, work: Callable[[str], Awaitable[None]]) -> None:
    """Serves for as long as `work`, which is given the service's address, takes."""
    asyncio.run(_serve_for(stack, work))


async def _serve(stack: Stack, settings: UpSettings) -> None:
    async with Supervisor(stack, settings.pids) as supervisor:
        if await supervisor.wait_ready(asyncio.create_task(_serving(stack.address, settings.workers))):
            workers = f"{settings.workers} worker{'s' if settings.workers > 1 else ''}"
            where = f"127.0.0.1:{settings.port}" if settings.port is not None else stack.address
            print(f"pagoda: ready, {settings.model.resolve().name} on {where} with {workers}", flush=True)
            stack.log.release()
            await supervisor.stopping.wait()
        down = supervisor.down
    if down:
        raise DeployError(f"not everything was running at the end: {down}")


async def _serve_for(stack: Stack, work: Callable[[str], Awaitable[None]]) -> None:
    async with Supervisor(stack) as supervisor:
        if not await supervisor.wait_ready(asyncio.create_task(_serving(stack.address, 1))):
            raise DeployError("interrupted", 130)
        task = asyncio.ensure_future(work(stack.address))
        stopping = asyncio.create_task(supervisor.stopping.wait())
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            raise DeployError("interrupted", 130)
        stopping.cancel()
        task.result()


async def _serving(address: str, num_workers: int) -> None:
    """Waits until the service says that it serves, with that many workers."""
    path = address.removeprefix("unix:")
    while not await _listens(path):  # noqa: ASYNC110 - no event comes from another process
        await asyncio.sleep(_POLL_S)
    from scheduler.client import PagodaClient  # only now: gRPC's import would hold up the workers' start

    async with PagodaClient(address) as client:
        await client.wait_serving()
        while num_workers > 1 and await _count_live(client) < num_workers:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


async def _count_live(client: "PagodaClient") -> int:
    status = await client.get_status()
    return sum(worker.state == _LIVE for worker in status.workers)


async def _listens(path: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True
