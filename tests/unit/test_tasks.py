"""Tasks end, whatever becomes of a cancellation."""

import asyncio
import contextlib

import pytest

from scheduler import tasks


async def test_a_lost_cancellation_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE_S", 0.01)
    num_lost = 0

    async def work() -> None:
        nonlocal num_lost
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            num_lost += 1
        await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.end(task)
    assert task.cancelled()
    assert num_lost == 2


async def test_what_else_ended_it_is_raised() -> None:
    async def work() -> None:
        raise ValueError("of its own")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="of its own"):
        await tasks.end(task)


async def test_who_ends_a_task_may_be_cancelled_meanwhile() -> None:
    """It is not taken for the task's own end."""

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ending = asyncio.create_task(tasks.end(task))
    await asyncio.sleep(0.01)
    ending.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(ending, return_exceptions=True)
    assert ending.cancelled()
    assert not task.done()
