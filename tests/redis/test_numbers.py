"""Epochs and numbers: a script is applied once, whole, in order, by the owner alone."""

import asyncio

import pytest
from redis.exceptions import ResponseError

from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.host_pool import HostImage
from scheduler.keys import worker_key
from scheduler.redis_pipe import RedisPipe
from scheduler.store import SequenceRow, WorkerStore
from tests.redis.redis_dump import dump
from tests.redis_servers import RedisServer

WORKER = "worker-0"
ROW = SequenceRow("request", 0, 0, 0, 0, -1).pack()


@pytest.fixture
async def store(pipe: RedisPipe) -> WorkerStore:
    """A seized worker with an empty pool of 8 blocks: script 1 is applied."""
    store = WorkerStore(pipe, WORKER, 600)
    await store.seize(0)
    await store.reclaim("incarnation-1", 8, 2)
    return store


async def verdict(server: RedisServer, reply: "asyncio.Future[object]") -> str:
    """The answer of a script that must not change anything."""
    with server.client() as client:
        before = dump(client)
        try:
            answer = await reply
        except ResponseError as error:
            answer = str(error)
        assert dump(client) == before
    return answer.decode() if isinstance(answer, bytes) else str(answer)


async def test_a_repeated_script_is_answered_done(server: RedisServer, store: WorkerStore) -> None:
    changes = Changes(append=[(1, 0, [1])], reserve=[(1, [], [1, 2])], describe=[(1, ROW)])
    assert await store.commit(changes, 1) == b"ok"
    for repeated in (2, 1):
        store.n = repeated - 1
        assert await verdict(server, store.commit(changes, 1)) == "done"
    store.n = 0
    assert await verdict(server, store.reclaim("incarnation-1", 8)) == "done"


async def test_a_gap_is_refused(server: RedisServer, store: WorkerStore) -> None:
    store.n += 1
    assert await verdict(server, store.commit(Changes(append=[(1, 0, [1])]), 1)) == "GAP script 3 on top of 1"
    store.n += 4
    assert await verdict(server, store.reclaim("incarnation-2", 4)) == "GAP script 8 on top of 1"


async def test_a_stale_epoch_is_refused_before_anything_else(
    server: RedisServer, pipe: RedisPipe, store: WorkerStore
) -> None:
    await store.commit(Changes(append=[(1, 0, [1])]), 1)
    second = WorkerStore(pipe, WORKER, 600)
    meta = await second.seize(0)
    assert (meta.epoch, meta.n, meta.committed_step_id, meta.incarnation) == (2, 2, 1, "incarnation-1")
    for n in (1, 2, 3, 9):  # applied before, next, and out of order: all the same
        store.n = n - 1
        assert (await verdict(server, store.commit(Changes(), 1))).startswith("STALE epoch 1, the owner has 2")
        store.n = n - 1
        assert (await verdict(server, store.reclaim("", 0))).startswith("STALE epoch 1, the owner has 2")
    assert await second.commit(Changes(append=[(1, 1, [2])]), 2) == b"ok"


async def test_a_worker_that_nobody_seized_takes_no_script(server: RedisServer, pipe: RedisPipe) -> None:
    store = WorkerStore(pipe, "worker-1", 600)
    assert (await verdict(server, store.commit(Changes(), 0))).startswith("STALE")


@pytest.mark.parametrize(("seen_by_worker", "epoch"), [(0, 2), (1, 2), (2, 3), (41, 42)])
async def test_seize_goes_above_redis_and_above_the_worker(
    pipe: RedisPipe, store: WorkerStore, seen_by_worker: int, epoch: int
) -> None:
    second = WorkerStore(pipe, WORKER, 600)
    assert (await second.seize(seen_by_worker)).epoch == epoch
    assert (await second.seize(seen_by_worker)).epoch == epoch + 1, "repeated after a lost reply"


async def test_seize_stays_exact_beyond_what_fits_into_a_word(server: RedisServer, pipe: RedisPipe) -> None:
    store = WorkerStore(pipe, WORKER, 600)
    assert (await store.seize(2**40)).epoch == 2**40 + 1
    assert await store.reclaim("incarnation-1", 8) == b"ok"
    with server.client() as client:
        assert client.hget(worker_key(WORKER, "meta"), "epoch") == b"1099511627777"


async def test_many_owners_at_once_end_with_one(pipe: RedisPipe, store: WorkerStore) -> None:
    owners = [WorkerStore(pipe, WORKER, 600) for _ in range(20)]
    await asyncio.gather(*(owner.seize(0) for owner in owners))
    replies = [owner.commit(Changes(append=[(1, 0, [owner.epoch])]), 1) for owner in owners]
    answers = await asyncio.gather(*replies, return_exceptions=True)
    assert [answer for answer in answers if answer == b"ok"] == [b"ok"]
    assert answers[-1] == b"ok", "the last to seize"
    assert sorted(owner.epoch for owner in owners) == list(range(2, 22))


async def test_reclaim_leaves_no_phantom_of_a_dead_incarnation(pipe: RedisPipe, store: WorkerStore) -> None:
    await store.commit(Changes(reserve=[(1, [], [1, 2, 3])], describe=[(1, ROW)], computed=[(1, 0)]), 0)
    await store.commit(Changes(publish=[(1, b"\x01" * 16)], fork=[(1, 2, 1, 2, 4, 3)], append=[(1, 0, [5])]), 1)
    await store.commit(Changes(swap_out=[(1, b"\x01" * 16, 2)]), 1)
    await store.reclaim("incarnation-2", 4, 3)
    image = await store.load()
    assert (image.pool, image.host) == (PoolImage(4, {}, {}, {}), HostImage(3))
    assert (image.tables, image.computed) == ({}, {})
    assert await store.load_index() == {}
    assert list(image.rows) == [1], "sequences stay"
    assert image.logs == {1: [5]}, "and so do their logs"
    meta = await WorkerStore(pipe, WORKER, 600).seize(0)
    assert (meta.incarnation, meta.committed_step_id, meta.n) == ("incarnation-2", 0, 5)


@pytest.mark.parametrize("num_blocks", [0, 1, 4])
async def test_reclaim_lays_a_pool_of_the_new_size(server: RedisServer, store: WorkerStore, num_blocks: int) -> None:
    await store.reclaim("", num_blocks)
    with server.client() as client:
        assert client.strlen(worker_key(WORKER, "pool")) == (20 * (num_blocks + 1) if num_blocks else 0)
    outside = Changes(reserve=[(1, [], [num_blocks + 1])])
    assert "not in the pool" in await verdict(server, store.commit(outside, 0))


async def test_scripts_in_flight_need_no_answer_to_the_one_before(store: WorkerStore) -> None:
    replies = [store.commit(Changes(append=[(1, i, [i])]), i) for i in range(100)]
    assert await asyncio.gather(*replies) == [b"ok"] * 100
    image = await store.load()
    assert image.logs == {}, "a log without a row belongs to nobody here"


async def test_a_refusal_refuses_all_that_stand_on_it(server: RedisServer, store: WorkerStore) -> None:
    replies = [store.commit(Changes(append=[(1, i, [i])]), i) for i in (0, 1, 5, 2)]
    answers = await asyncio.gather(*replies, return_exceptions=True)
    assert answers[:2] == [b"ok", b"ok"]
    assert str(answers[2]).startswith("REFUSED")
    assert str(answers[3]).startswith("GAP")
