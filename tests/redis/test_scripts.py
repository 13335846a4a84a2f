"""The step's script verb by verb: what it applies, and every refusal, each of which leaves Redis as it was."""

from dataclasses import replace

import pytest
from redis.exceptions import ResponseError

from scheduler.changes import Changes
from scheduler.host_pool import HostImage
from scheduler.keys import log_key, worker_key
from scheduler.redis_pipe import RedisPipe
from scheduler.store import NO_HASH, SequenceRow, WorkerStore
from tests.redis.redis_dump import dump, parse_u32
from tests.redis_servers import RedisServer

WORKER = "worker-0"
LOG_TTL_S = 600
NUM_BLOCKS = 8
NUM_HOST_BLOCKS = 4
HASH, OTHER_HASH = b"\x01" * 16, b"\x02" * 16
ROW = SequenceRow("request", 0, 0, 0, 0, -1).pack()


@pytest.fixture
async def store(pipe: RedisPipe) -> WorkerStore:
    """A seized worker with an empty pool: script 1 is applied."""
    store = WorkerStore(pipe, WORKER, LOG_TTL_S)
    await store.seize(0)
    await store.reclaim("incarnation-1", NUM_BLOCKS, NUM_HOST_BLOCKS)
    return store


async def a_pool(store: WorkerStore) -> None:
    """Sequence 1 has blocks 1 (published), 2 and 3 and two tokens; block 4 is cached; 5 to 8 are free.

    Host block 1 has what block 4 has, block 1 is on its way to host block 2, host blocks 3 and 4 are free.
    """
    await store.commit(Changes(reserve=[(1, [], [1, 2, 3]), (2, [], [4])], describe=[(1, ROW), (2, ROW)]), 0)
    await store.commit(Changes(publish=[(1, HASH), (4, OTHER_HASH)], append=[(1, 0, [10, 11])], computed=[(1, 16)]), 1)
    await store.commit(Changes(release=[2], swap_out=[(4, OTHER_HASH, 1)]), 1)
    await store.commit(Changes(swapped_out=[1], swap_out=[(1, HASH, 2)]), 1)


async def refused(server: RedisServer, store: WorkerStore, changes: Changes) -> str:
    """The reason with which the next script is refused; asserts that it changed nothing and was not counted."""
    with server.client() as client:
        before = dump(client)
        with pytest.raises(ResponseError, match=r"^REFUSED") as refusal:
            await store.commit(changes, 99)
        assert dump(client) == before
    store.n -= 1
    return str(refusal.value).removeprefix("REFUSED ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (Changes(append=[(1, 3, [12])]), "append at 3 of a log of 2 tokens"),
        (Changes(append=[(1, 1, [12])]), "append at 1 of a log of 2 tokens"),
        (Changes(append=[(1, 0, [10, 11])]), "append at 0 of a log of 2 tokens"),
        (Changes(append=[(1, 2, [12]), (1, 2, [13])]), "append at 2 of a log of 3 tokens"),
        (Changes(append=[(1, 2, [12]), (1, 4, [13])]), "append at 4 of a log of 3 tokens"),
        (Changes(append=[(7, 1, [12])]), "append at 1 of a log of 0 tokens"),
        (Changes(publish=[(5, b"\x03" * 16)]), "publish of block 5, which nobody references"),
        (Changes(publish=[(4, b"\x03" * 16)]), "publish of block 4, which nobody references"),
        (Changes(publish=[(1, b"\x03" * 16)]), "publish of block 1, which has a hash"),
        (Changes(publish=[(2, HASH)]), "publish of a hash that block 1 has"),
        (Changes(publish=[(2, OTHER_HASH)]), "publish of a hash that block 4 has"),
        (Changes(publish=[(2, b"\x03" * 16), (3, b"\x03" * 16)]), "publish of a hash that block 2 has"),
        (Changes(publish=[(2, NO_HASH)]), "publish of block 2 without a hash"),
        (Changes(publish=[(0, b"\x03" * 16)]), "block 0 is not in the pool"),
        (Changes(publish=[(9, b"\x03" * 16)]), "block 9 is not in the pool"),
        (Changes(reserve=[(3, [], [0])]), "block 0 is not in the pool"),
        (Changes(reserve=[(3, [], [9])]), "block 9 is not in the pool"),
        (Changes(reserve=[(3, [], [2**32 - 1])]), "block 4294967295 is not in the pool"),
        (Changes(reserve=[(3, [], [2])]), "block 2 is referenced, not free or cached"),
        (Changes(reserve=[(3, [], [5, 5])]), "block 5 is referenced, not free or cached"),
        (Changes(reserve=[(3, [], [5]), (4, [], [5])]), "block 5 is referenced, not free or cached"),
        (Changes(reserve=[(3, [(1, OTHER_HASH)], [])]), "block 1 does not hold the shared hash"),
        (Changes(reserve=[(3, [(2, HASH)], [])]), "block 2 does not hold the shared hash"),
        (Changes(reserve=[(3, [(2, NO_HASH)], [])]), "block 2 does not hold the shared hash"),
        (Changes(reserve=[(3, [(0, NO_HASH)], [])]), "block 0 is not in the pool"),
        (Changes(reserve=[(3, [], [4]), (4, [(4, OTHER_HASH)], [])]), "block 4 does not hold the shared hash"),
        (Changes(release=[2]), "release of a sequence without blocks"),
        (Changes(release=[7]), "release of a sequence without blocks"),
        (Changes(release=[1, 1]), "release of a sequence without blocks"),
        (Changes(fork=[(1, 3, 4, 0, 0, 0)]), "fork of 4 blocks from a shorter table"),
        (Changes(fork=[(7, 3, 1, 0, 0, 0)]), "fork of 1 blocks from a shorter table"),
        (Changes(fork=[(1, 1, 1, 0, 0, 0)]), "fork into a sequence that has blocks"),
        (Changes(fork=[(1, 3, 1, 5, 6, 2)]), "copy of block 5, which nobody references"),
        (Changes(fork=[(1, 3, 1, 2, 3, 2)]), "block 3 is referenced, not free or cached"),
        (Changes(fork=[(1, 3, 1, 2, 9, 2)]), "block 9 is not in the pool"),
        (Changes(fork=[(1, 3, 1, 9, 5, 2)]), "block 9 is not in the pool"),
        (Changes(fork=[(1, 3, 1, 2, 5, 2), (3, 4, 1, 5, 6, 1)]), "copy of block 5 before its own copy is done"),
        (Changes(copied=[5]), "block 5 has no copy running"),
        (Changes(swap_out=[(2, HASH, 3)]), "block 2 does not hold what is to go out"),
        (Changes(swap_out=[(2, NO_HASH, 3)]), "block 2 does not hold what is to go out"),
        (Changes(swap_out=[(4, HASH, 3)]), "block 4 does not hold what is to go out"),
        (Changes(swap_out=[(1, HASH, 2)]), "host block 2 is held, not free or cached"),
        (Changes(swap_out=[(1, HASH, 3), (4, OTHER_HASH, 3)]), "host block 3 is held, not free or cached"),
        (Changes(swap_out=[(1, HASH, 5)]), "host block 5 is not in the pool"),
        (Changes(swap_out=[(1, HASH, 0)]), "host block 0 is not in the pool"),
        (Changes(swap_out=[(9, HASH, 3)]), "block 9 is not in the pool"),
        (Changes(swapped_out=[1]), "nothing is on its way out to host block 1"),
        (Changes(swapped_out=[2, 2]), "nothing is on its way out to host block 2"),
        (Changes(swap_in=[(1, HASH, 3)]), "host block 1 does not hold the shared hash"),
        (Changes(swap_in=[(3, NO_HASH, 3)]), "host block 3 does not hold the shared hash"),
        (Changes(swap_in=[(2, HASH, 3)]), "host block 2 does not hold the shared hash"),
        (Changes(swap_in=[(1, OTHER_HASH, 5)]), "block 5 is not reserved and empty"),
        (Changes(swap_in=[(1, OTHER_HASH, 1)]), "block 1 is not reserved and empty"),
        (Changes(swap_in=[(1, OTHER_HASH, 4)]), "block 4 is not reserved and empty"),
        (Changes(swap_in=[(1, OTHER_HASH, 3), (1, OTHER_HASH, 3)]), "something is on its way into block 3"),
        (Changes(swap_out=[(1, HASH, 1)], swap_in=[(1, OTHER_HASH, 3)]), "host block 1 does not hold the shared hash"),
        (Changes(swapped_in=[3]), "nothing is on its way into block 3"),
        (Changes(pin=[(7, b"a pin")]), "pin of a table that does not match"),
        (Changes(pin=[(1, b"")]), "pin of a table that does not match"),
        (Changes(release=[1], pin=[(1, b"a pin")]), "pin of a table that does not match"),
        (Changes(close=[1]), "close of a sequence that has blocks"),
        (Changes(forget=[1]), "forget of a sequence that has blocks"),
        (Changes(close=[3], reserve=[(3, [], [5])]), "close of a sequence that has blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_refuses_what_does_not_fit(
    server: RedisServer, store: WorkerStore, changes: Changes, reason: str
) -> None:
    await a_pool(store)
    # between rows that would fit: all or nothing
    among_others = replace(changes, append=[(8, 0, [1]), *changes.append], forget=[*changes.forget, 8])
    assert await refused(server, store, among_others) == reason
    assert await store.commit(Changes(append=[(1, 2, [12])]), 2) == b"ok"


async def test_a_second_copy_of_a_running_one_and_its_end_twice(server: RedisServer, store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(fork=[(1, 3, 1, 2, 5, 2)]), 1)
    reason = "copy of block 5 before its own copy is done"
    assert await refused(server, store, Changes(fork=[(3, 4, 1, 5, 6, 1)])) == reason
    assert await refused(server, store, Changes(copied=[5, 5])) == "block 5 has no copy running"
    assert await store.commit(Changes(copied=[5], fork=[(3, 4, 1, 5, 6, 1)]), 2) == b"ok"


async def test_a_script_applies_all_its_verbs_in_their_order(server: RedisServer, store: WorkerStore) -> None:
    await a_pool(store)
    changes = Changes(
        append=[(1, 2, [12]), (1, 3, [13, 14])],
        computed=[(1, -1)],
        publish=[(2, b"\x03" * 16)],
        release=[1],
        describe=[(3, ROW)],
        reserve=[(3, [(1, HASH), (2, b"\x03" * 16)], [3, 4])],  # 3 was released, 4 is evicted
        close=[1, 2],
    )
    assert await store.commit(changes, 7) == b"ok"
    image = await store.load()
    assert image.tables == {3: [1, 2, 3, 4]}
    assert image.pool.ref_counts == {1: 2, 2: 1, 3: 1, 4: 1}
    assert image.pool.hashes == {1: HASH, 2: b"\x03" * 16}
    assert image.computed == {}
    assert list(image.rows) == [3]
    assert await store.load_index() == {HASH: 1, b"\x03" * 16: 2}
    with server.client() as client:
        assert parse_u32(client.get(log_key(WORKER, 1))) == [10, 11, 12, 13, 14]
        assert client.hget(worker_key(WORKER, "meta"), "committed_step_id") == b"7"
        assert 0 < client.ttl(log_key(WORKER, 1)) <= LOG_TTL_S


async def test_a_reused_block_leaves_no_stale_hash(store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(reserve=[(3, [], [4])]), 1)
    assert await store.load_index() == {HASH: 1}
    await store.commit(Changes(publish=[(4, b"\x03" * 16)]), 2)
    await store.commit(Changes(release=[3]), 2)
    assert await store.load_index() == {HASH: 1, b"\x03" * 16: 4}


async def test_a_hit_cannot_be_evicted_between_look_up_and_allocation(server: RedisServer, store: WorkerStore) -> None:
    """The look-up is the owner's; the script that allocates sees whether the block still holds that hash."""
    await a_pool(store)
    await store.commit(Changes(reserve=[(3, [], [4])]), 1)
    shares = Changes(reserve=[(5, [(4, OTHER_HASH)], [])])
    assert await refused(server, store, shares) == "block 4 does not hold the shared hash"


async def test_a_copy_holds_source_and_destination_until_it_is_committed(store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(fork=[(1, 3, 1, 2, 5, 2)], describe=[(3, ROW)]), 1)
    image = await store.load()
    assert image.pool.copies == {5: (2, 2)}
    assert image.pool.ref_counts == {1: 3, 2: 2, 3: 1, 5: 2}
    await store.commit(Changes(release=[1, 3], swapped_out=[2]), 1)
    assert (await store.load()).pool.ref_counts == {2: 1, 5: 1}
    await store.commit(Changes(copied=[5]), 2)
    image = await store.load()
    assert (image.pool.ref_counts, image.pool.copies) == ({}, {})


async def test_a_swap_out_holds_both_ends_and_ends_as_a_hit_on_the_host(store: WorkerStore) -> None:
    await a_pool(store)
    image = await store.load()
    assert image.pool.ref_counts == {1: 2, 2: 1, 3: 1}
    assert image.host == HostImage(NUM_HOST_BLOCKS, {2: 1}, {1: OTHER_HASH}, {2: 1}, {})
    await store.commit(Changes(release=[1]), 1)
    assert (await store.load()).pool.ref_counts == {1: 1}
    await store.commit(Changes(swapped_out=[2], reserve=[(3, [], [1])]), 1)  # out, let go, and evicted at once
    image = await store.load()
    assert (image.pool.ref_counts, image.pool.hashes) == ({1: 1}, {4: OTHER_HASH})
    assert image.host == HostImage(NUM_HOST_BLOCKS, {}, {1: OTHER_HASH, 2: HASH}, {}, {})


async def test_a_swap_in_holds_both_ends_and_ends_as_a_published_block(store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(reserve=[(3, [], [4, 5])], swap_in=[(1, OTHER_HASH, 4)]), 1)
    image = await store.load()
    assert (image.pool.ref_counts, image.pool.hashes) == ({1: 2, 2: 1, 3: 1, 4: 2, 5: 1}, {1: HASH})
    assert image.host == HostImage(NUM_HOST_BLOCKS, {1: 1, 2: 1}, {1: OTHER_HASH}, {2: 1}, {4: 1})
    await store.commit(Changes(publish=[(4, OTHER_HASH)], swapped_in=[4], release=[3]), 1)
    image = await store.load()
    assert (image.pool.ref_counts, image.pool.hashes) == ({1: 2, 2: 1, 3: 1}, {1: HASH, 4: OTHER_HASH})
    assert image.host == HostImage(NUM_HOST_BLOCKS, {2: 1}, {1: OTHER_HASH}, {2: 1}, {})


async def test_a_swap_in_outlives_the_table_that_wanted_it(server: RedisServer, store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(reserve=[(3, [], [5])], swap_in=[(1, OTHER_HASH, 5)]), 1)
    await store.commit(Changes(release=[3]), 1)
    taken = Changes(reserve=[(4, [], [5])])
    assert await refused(server, store, taken) == "block 5 is referenced, not free or cached"
    assert await store.commit(Changes(swapped_in=[5], reserve=[(4, [], [5])]), 1) == b"ok"


async def test_what_goes_out_ousts_what_the_host_block_held(store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(publish=[(2, b"\x03" * 16)], swap_out=[(2, b"\x03" * 16, 1)]), 1)
    assert (await store.load()).host.hashes == {}
    await store.commit(Changes(swapped_out=[1]), 1)
    assert (await store.load()).host.hashes == {1: b"\x03" * 16}


async def test_a_fork_shares_and_copies_what_the_parent_has(store: WorkerStore) -> None:
    await a_pool(store)
    await store.commit(Changes(fork=[(1, 3, 2, 0, 0, 0), (1, 4, 0, 3, 4, 1), (1, 5, 3, 0, 0, 0)]), 1)
    image = await store.load()
    assert image.tables == {1: [1, 2, 3], 3: [1, 2], 4: [4], 5: [1, 2, 3]}
    assert image.pool.hashes == {1: HASH}, "the copy went into an evicted block"


async def test_a_moved_sequence_leaves_its_log_and_a_closed_one_lets_it_expire(
    server: RedisServer, store: WorkerStore
) -> None:
    await store.commit(Changes(append=[(1, 0, [1]), (2, 0, [2])], describe=[(1, ROW), (2, ROW)]), 0)
    await store.commit(Changes(forget=[1], close=[2]), 0)
    with server.client() as client:
        assert client.ttl(log_key(WORKER, 1)) == -1
        assert 0 < client.ttl(log_key(WORKER, 2)) <= LOG_TTL_S
    assert (await store.load()).rows == {}


async def test_an_empty_script_counts_and_notes_its_step(server: RedisServer, store: WorkerStore) -> None:
    assert await store.commit(Changes(), 5) == b"ok"
    with server.client() as client:
        meta = client.hgetall(worker_key(WORKER, "meta"))
    assert (meta[b"n"], meta[b"committed_step_id"]) == (b"2", b"5")


async def test_rows_of_a_large_step_fit_into_one_script(store: WorkerStore) -> None:
    """256 sequences, each with tokens, a hash and new blocks: no limit of Lua's stack or of KEYS is near."""
    await store.reclaim("incarnation-2", 20_000)
    ids = range(1, 257)
    blocks = {i: list(range(32 * i, 32 * i + 32)) for i in ids}
    await store.commit(Changes(reserve=[(i, [], blocks[i]) for i in ids], describe=[(i, ROW) for i in ids]), 0)
    step = Changes(
        append=[(i, 0, list(range(100))) for i in ids],
        computed=[(i, -1) for i in ids],
        publish=[(block_id, block_id.to_bytes(16, "big")) for i in ids for block_id in blocks[i]],
        reserve=[(i, [], [10_000 + i]) for i in ids],
    )
    assert await store.commit(step, 1) == b"ok"
    assert await store.commit(Changes(release=list(ids)), 2) == b"ok"
    image = await store.load()
    assert len(image.pool.hashes) == 256 * 32
    assert image.logs == {i: list(range(100)) for i in ids}
