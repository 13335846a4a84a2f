"""The gate that hundreds of streams wake up before: as many turns as the time allows, however late its passes come."""

import asyncio
import time

from scheduler.delivery import MAX_TURNS_PER_PASS, PASS_INTERVAL_S, TURN_INTERVAL_S, DeliveryGate

BUSY_S = 0.004
"""What else the event loop has to do, again and again: five times as long as a pass may wait."""


async def crowd(gate: DeliveryGate, num_streams: int, seconds: float) -> int:
    """So many streams that always want a turn; how many they had."""
    num_turns = 0

    async def stream() -> None:
        nonlocal num_turns
        while True:
            await gate.turn()
            num_turns += 1

    streams = [asyncio.create_task(stream()) for _ in range(num_streams)]
    await asyncio.sleep(seconds)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return num_turns


async def test_passes_that_come_late_make_up_for_it() -> None:
    num_blocks = 0

    async def engine() -> None:
        nonlocal num_blocks
        while True:
            time.sleep(BUSY_S)  # noqa: ASYNC251 - it keeps the loop, as an engine does
            num_blocks += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(engine())
    num_turns = await crowd(DeliveryGate(), 50, 0.5)
    busy.cancel()
    turns_in_time = PASS_INTERVAL_S / TURN_INTERVAL_S
    assert num_turns > turns_in_time * num_blocks, "a late pass served no more than one in time"
    assert num_turns <= (num_blocks + 2) * MAX_TURNS_PER_PASS


async def test_there_are_no_more_turns_than_the_pace_allows() -> None:
    began_s = time.monotonic()
    num_turns = await crowd(DeliveryGate(), 50, 0.3)
    assert num_turns <= (time.monotonic() - began_s) / TURN_INTERVAL_S + MAX_TURNS_PER_PASS
    assert num_turns > 0


async def test_turns_are_had_in_the_order_in_which_they_were_asked_for() -> None:
    gate, order = DeliveryGate(), []

    async def one(number: int) -> None:
        await gate.turn()
        order.append(number)

    leaver = asyncio.create_task(one(-1))
    others = [asyncio.create_task(one(number)) for number in range(40)]
    await asyncio.sleep(0)
    leaver.cancel()
    others[20].cancel()  # it waits by now
    await asyncio.gather(*others, return_exceptions=True)
    assert [number for number in order if number >= 0] == [number for number in range(40) if number != 20]
