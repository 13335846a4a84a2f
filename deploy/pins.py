"""`pagoda pins` and `pagoda unpin`: the prompts that requests keep in the cache."""

import json
import time
from collections.abc import Iterable

from pagoda.v1 import generation_pb2 as pb

from deploy.call import call_at
from scheduler.client import PagodaClient


def pins_at(port: int, as_json: bool) -> None:
    """Prints the pins of the service at a port of this machine."""

    async def show(client: PagodaClient) -> None:
        pools = (await client.get_blocks()).pools
        print(to_json(pools) if as_json else "\n".join(lines_of(pools, time.time())))

    call_at(port, show)


def unpin_at(port: int, request_id: str) -> None:
    """Ends a pin, and says what it held."""

    async def unpin(client: PagodaClient) -> None:
        print(f"{await client.unpin(request_id)} blocks may be evicted again")

    call_at(port, unpin)


def lines_of(pools: Iterable[pb.PoolBlocks], now_s: float) -> list[str]:
    """For people: a line for each worker, and each of its pins."""
    lines = []
    for pool in pools:
        what = f"{len(pool.pins)} pins of {sum(pin.num_blocks for pin in pool.pins)} blocks"
        lines.append(f"{pool.worker}: {what}; {pool.max_pinned_blocks} blocks may be pinned")
        for pin in sorted(pool.pins, key=lambda pin: pin.expires_at_s):
            left_s = max(0.0, pin.expires_at_s - now_s)
            lines.append(f"  {pin.request_id}: {pin.num_blocks} blocks, for {left_s:.0f} s more")
    return lines or ["no workers"]


def to_json(pools: Iterable[pb.PoolBlocks]) -> str:
    """One object on one line."""
    rows = [
        {
            "worker": pool.worker,
            "max_pinned_blocks": pool.max_pinned_blocks,
            "pins": [{field.name: getattr(pin, field.name) for field in pin.DESCRIPTOR.fields} for pin in pool.pins],
        }
        for pool in pools
    ]
    return json.dumps({"workers": rows})
