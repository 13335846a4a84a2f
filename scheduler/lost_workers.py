"""What becomes of a lost worker: its pool is void at once, its requests go to live workers, wait, or are given up.

Works on Redis alone, under the worker's own tag, with every step repeatable: a scheduler that dies in the middle leaves
nothing that its successor can't tell and finish.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.host_pool import HostImage
from scheduler.live_request import EndState, LiveRequest, pack_ends, unpack_ends
from scheduler.place import Place
from scheduler.recovery import Reviver, lose_worker
from scheduler.request_store import RequestStore
from scheduler.sequence import FinishReason
from scheduler.store import WorkerImage, WorkerStore

GIVEN_UP = EndState(FinishReason.ERROR, 0, "UNAVAILABLE", "no worker came back in time")


async def reclaim(
    store: WorkerStore, incarnation: str = "", num_blocks: int = 0, num_host_blocks: int = 0
) -> WorkerImage:
    """Lays empty pools for a new incarnation (none where it is ""), and counts the loss for all that ran."""
    image = await store.load()
    after = lose_worker(image)
    changed = [(seq_id, row.pack()) for seq_id, row in after.rows.items() if row != image.rows[seq_id]]
    replies = [store.reclaim(incarnation, num_blocks, num_host_blocks)]
    if changed:
        replies.append(store.commit(Changes(describe=changed), 0))
    await asyncio.gather(*replies)
    return replace(after, pool=PoolImage(num_blocks, {}, {}, {}), host=HostImage(num_host_blocks))


class LostWorkers:
    """`place` finds a live worker for a request; `on_end` is told of requests that are given up."""

    def __init__(
        self,
        requests: RequestStore,
        reviver: Reviver,
        place: Callable[[LiveRequest], Place],
        on_end: Callable[[LiveRequest], None],
    ) -> None:
        self._requests = requests
        self._reviver = reviver
        self._place = place
        self._on_end = on_end

    async def rehome(self, worker: str, store: WorkerStore) -> None:
        """Moves the requests to live workers: the record first, then the new row, then the old row goes."""
        gone = Changes()
        for revived in await self._reviver.revive(worker, await store.load()):
            if revived.live is None:
                revived.drop_from(gone)
            elif await self._move(revived.live, revived.recorded_worker):
                gone.forget += revived.rows
        if gone:
            await store.commit(gone, 0)

    async def give_up(self, worker: str, store: WorkerStore) -> None:
        """No worker came for too long: every request that waits for one ends with UNAVAILABLE."""
        owner = (worker, store.epoch)
        gone = Changes()
        for revived in await self._reviver.revive(worker, await store.load()):
            for seq_id, row in revived.rows.items():
                gone.close_row(seq_id, row.first_index)
            if revived.live is not None:
                await self._end(revived.live, owner, revived.recorded_worker)
        if gone:
            await store.commit(gone, 0)

    async def _move(self, live: LiveRequest, recorded_worker: str) -> bool:
        """Whether the request is durable under another worker's tag now."""
        with self._place(live) as place:
            engine = place.engine()
            if engine is None:
                return False
            first_indexes = live.log_lengths
            live.begin_segments(first_indexes)
            await self._requests.own(live.body.request_id, engine.committer.owner, recorded_worker, first_indexes)
            accepted = engine.open(live)
        await asyncio.wait((accepted, engine.lost), return_when=asyncio.FIRST_COMPLETED)
        return accepted.done()

    async def _end(self, live: LiveRequest, owner: tuple[str, int], recorded_worker: str) -> None:
        request_id = live.body.request_id
        await self._requests.own(request_id, owner, recorded_worker, live.log_lengths)
        held = await self._requests.end(request_id, owner, pack_ends([GIVEN_UP] * len(live.choices)))
        for choice, end in zip(live.choices, unpack_ends(held), strict=True):
            choice.end = end
        self._on_end(live)
