"""Tasks that end when they are told to."""

import asyncio

PATIENCE_S = 1.0
"""For what a cancelled task does yet."""


async def end(task: "asyncio.Task[None]") -> None:
    """Cancels a task until it has ended; raises what else ended it.

    One cancellation may be lost: before Python 3.12 asyncio.wait_for swallows one that comes when what it waits for is
    just done.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE_S)
    if not task.cancelled():
        task.result()
