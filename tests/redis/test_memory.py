"""What a block costs in Redis, and that nothing is left behind."""

import pytest

from scheduler.changes import Changes
from scheduler.keys import worker_key
from scheduler.redis_pipe import RedisPipe
from scheduler.request_store import RequestStore
from scheduler.store import SequenceRow, WorkerStore
from tests.redis.redis_dump import dump
from tests.redis_servers import RedisServer

WORKER = "worker-0"
NUM_BLOCKS = 10_000
MAX_BYTES_PER_BLOCK = 130
ROW = SequenceRow("request", 0, 0, 0, 0, -1).pack()


@pytest.fixture
async def store(pipe: RedisPipe) -> WorkerStore:
    store = WorkerStore(pipe, WORKER, 1)
    await store.seize(0)
    return store


async def test_memory_of_a_published_block(server: RedisServer, store: WorkerStore) -> None:
    """Pool row and index entry; random hashes, as BLAKE2 gives them."""
    await store.reclaim("incarnation-1", NUM_BLOCKS)
    blocks = list(range(1, NUM_BLOCKS + 1))
    await store.commit(Changes(reserve=[(1, [], blocks)]), 0)
    for first in range(0, NUM_BLOCKS, 1000):
        rows = [(i, hash(("block", i)).to_bytes(8, "little", signed=True) * 2) for i in blocks[first : first + 1000]]
        await store.commit(Changes(publish=rows), 0)
    await store.commit(Changes(release=[1]), 0)
    with server.client() as client:
        sizes = {part: client.memory_usage(worker_key(WORKER, part), samples=0) for part in ("pool", "index")}
        assert client.hlen(worker_key(WORKER, "index")) == NUM_BLOCKS
    per_block = {part: size / NUM_BLOCKS for part, size in sizes.items()}
    total = sum(per_block.values())
    print(f"\n{server.kind}: {total:.1f} bytes per published block", {k: round(v, 1) for k, v in per_block.items()})
    assert total < MAX_BYTES_PER_BLOCK


async def test_nothing_is_left_behind_but_what_is_documented(
    server: RedisServer, pipe: RedisPipe, store: WorkerStore
) -> None:
    """After the last sequence: meta, pool and index of the worker, and the logs, which expire."""
    requests = RequestStore(pipe, 1, 6000)
    await store.reclaim("incarnation-1", 64)
    ids = range(1, 21)
    for i in ids:
        await requests.create(f"r{i}", b"digest", b"body", (WORKER, store.epoch), range(i, i + 1))
    await store.commit(Changes(reserve=[(i, [], [i, 20 + i]) for i in ids], describe=[(i, ROW) for i in ids]), 0)
    await store.commit(Changes(append=[(i, 0, [1, 2]) for i in ids], computed=[(i, 16) for i in ids]), 1)
    forks = [(i, 100 + i, 1, 20 + i, 40 + i, 3) for i in ids]
    await store.commit(Changes(publish=[(i, i.to_bytes(16, "big")) for i in ids], fork=forks), 1)
    await store.commit(Changes(copied=[40 + i for i in ids]), 2)
    await store.commit(Changes(release=[*ids, *(100 + i for i in ids)]), 2)
    for i in ids:
        await requests.end(f"r{i}", (WORKER, store.epoch), b"end")
    await store.commit(Changes(close=list(ids)), 3)
    with server.client() as client:
        kept = {key.decode(): expires for key, (_, expires) in dump(client).items()}
    permanent = {key for key, expires in kept.items() if not expires}
    assert permanent == {worker_key(WORKER, part) for part in ("meta", "pool", "index")}
    assert len(kept) - len(permanent) == 20 + 20, "records and logs, for their time"
