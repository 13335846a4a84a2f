"""What every block of every pool is, as packed columns, for `pagoda blocks`."""

import asyncio
import struct

from pagoda.v1 import generation_pb2 as pb

from scheduler.errors import NotFoundError
from scheduler.fleet import Fleet, Slot

BLOCKS_PER_TURN = 4096
"""Looked at, in some 2 ms, before the steps have the loop again."""


async def blocks_of(fleet: Fleet, worker: str) -> pb.GetBlocksResponse:
    """All pools, or one worker's. Raises NotFoundError."""
    if worker and worker not in fleet.slots:
        raise NotFoundError(f"worker: no worker {worker!r}; pagoda status names them")
    slots = sorted(fleet.slots.values(), key=lambda slot: slot.name)
    return pb.GetBlocksResponse(pools=[await _pool(slot) for slot in slots if worker in ("", slot.name)])


async def _pool(slot: Slot) -> pb.PoolBlocks:
    engine = slot.engine
    if engine is None or engine.is_lost:
        return pb.PoolBlocks(worker=slot.name, state=pb.WORKER_STATE_LOST)
    planner, blocks = engine.planner, engine.planner.blocks
    states, ref_counts = bytearray(), bytearray()
    for first in range(1, blocks.num_blocks + 1, BLOCKS_PER_TURN):
        last = min(first + BLOCKS_PER_TURN - 1, blocks.num_blocks)
        states += blocks.states(first, last)
        ref_counts += struct.pack(f"<{last - first + 1}I", *blocks.ref_counts(first, last))
        await asyncio.sleep(0)
    host, host_states = planner.swapper.host, bytearray()
    for first in range(1, host.num_blocks + 1, BLOCKS_PER_TURN):
        host_states += host.states(first, min(first + BLOCKS_PER_TURN - 1, host.num_blocks))
        await asyncio.sleep(0)
    return pb.PoolBlocks(
        worker=slot.name,
        state=pb.WORKER_STATE_LIVE,
        block_size=planner.limits.block_size,
        states=bytes(states),
        ref_counts=bytes(ref_counts),
        num_evictions=planner.history.num_evictions,
        host_states=bytes(host_states),
        pins=[
            pb.Pin(request_id=pin.request_id, num_blocks=len(pin.block_ids), expires_at_s=pin.expires_at_s)
            for pin in planner.pins.pinned.values()
        ],
        max_pinned_blocks=planner.pins.max_blocks,
    )
