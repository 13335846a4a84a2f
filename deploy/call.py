"""A call of a running service from a command: reaching it, and saying in one line what went wrong."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from deploy.errors import DeployError
from scheduler.client import PagodaClient

_CONNECT_TIMEOUT_S = 5.0


def call_at(port: int, call: Callable[[PagodaClient], Awaitable[None]]) -> None:
    """Runs `call` with a client of the service at a port of this machine. Raises DeployError."""
    asyncio.run(_call_at(port, call))


async def _call_at(port: int, call: Callable[[PagodaClient], Awaitable[None]]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await _check_listens(port)
    try:
        async with PagodaClient(f"127.0.0.1:{port}") as client:
            await call(client)
    except grpc.aio.AioRpcError as error:
        raise explain(error) from None
    except asyncio.CancelledError:
        raise DeployError("interrupted", 130) from None


async def _check_listens(port: int) -> None:
    """A client would wait for a service that is not there yet; a person wants to know."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), _CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, OverflowError):
        raise DeployError(f"nothing answers on port {port}; start it with pagoda up, or name its --port") from None
    writer.close()


def explain(error: grpc.aio.AioRpcError) -> DeployError:
    """A status as one line."""
    details = " ".join((error.details() or "no reason given").split())
    return DeployError(f"{error.code().name}: {details}")
