"""`pagoda blocks`: every block of every pool, drawn once or again and again."""

import asyncio
import json
import struct
from contextlib import suppress

import grpc.aio
from pagoda.v1 import generation_pb2 as pb
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from deploy.call import call_at
from deploy.pool_map import HOST_LEGEND, LEGEND, SHADED_LEGEND, MapSize, draw_pool
from scheduler.client import PagodaClient, is_broken

REFRESH_INTERVAL_S = 0.5
MAX_ROWS, MIN_ROWS = 16, 4
"""Rows of cells for one pool; watched, all pools are to fit the terminal."""


def blocks_at(port: int, worker: str, as_json: bool, is_watched: bool) -> None:
    """Prints the pools of the service at a port of this machine; on a terminal, watched, until Ctrl-C."""
    console = Console()

    async def show(client: PagodaClient) -> None:
        pools = await client.get_blocks(worker)
        if as_json:
            print(to_json(pools))
        elif is_watched and console.is_terminal:
            await _watch(client, worker, console, pools)
        else:
            console.print(frame(pools, MapSize(console.width, MAX_ROWS)), soft_wrap=True)

    call_at(port, show)


async def _watch(client: PagodaClient, worker: str, console: Console, pools: pb.GetBlocksResponse) -> None:
    """The last frame stays, with a word, while the scheduler is away."""
    note = ""
    with suppress(asyncio.CancelledError), Live(console=console, auto_refresh=False) as live:
        while True:
            num_maps = sum(1 + bool(pool.host_states) for pool in pools.pools)
            rows_each = (console.height - 4) // max(1, num_maps) - 3
            size = MapSize(console.width, max(MIN_ROWS, min(MAX_ROWS, rows_each)))
            live.update(frame(pools, size, note), refresh=True)
            await asyncio.sleep(REFRESH_INTERVAL_S)
            try:
                pools, note = await client.get_blocks(worker), ""
            except grpc.aio.AioRpcError as error:
                if not is_broken(error):
                    raise
                note = "the scheduler does not answer; this is what it said last"


def frame(pools: pb.GetBlocksResponse, size: MapSize, note: str = "") -> Group:
    """All pools, and how to read them."""
    if not pools.pools:
        return Group(Text("no workers"))
    scales = {size.blocks_per_cell(len(pool.states)) for pool in pools.pools if pool.states}
    has_host = any(pool.host_states for pool in pools.pools)
    legends = [LEGEND] * (1 in scales) + [SHADED_LEGEND] * bool(scales - {1}) + [HOST_LEGEND] * has_host
    lines = [Text(line, "dim") for line in legends] + [Text(note, "bold red")] * bool(note)
    return Group(*(draw_pool(pool, size) for pool in pools.pools), *lines)


def to_json(pools: pb.GetBlocksResponse) -> str:
    """One object on one line; states have a letter per block: free, referenced, cached, protected, set aside."""
    letters = bytes.maketrans(bytes(range(6)), b"?frcps")
    rows = [
        {
            "worker": pool.worker,
            "state": pb.WorkerState.Name(pool.state).removeprefix("WORKER_STATE_").lower(),
            "block_size": pool.block_size,
            "num_evictions": pool.num_evictions,
            "states": pool.states.translate(letters).decode(),
            "ref_counts": struct.unpack(f"<{len(pool.states)}I", pool.ref_counts),
            "host_states": pool.host_states.translate(letters).decode(),
        }
        for pool in pools.pools
    ]
    return json.dumps({"pools": rows})
