"""The records of requests: one body per request_id, one owner at a time, one end."""

import pytest

from scheduler.keys import log_key, request_key
from scheduler.redis_pipe import RedisPipe
from scheduler.request_store import OwnershipLostError, RequestRecord, RequestStore
from tests.redis.redis_dump import dump
from tests.redis_servers import RedisServer

RECORD_TTL_S, REQUEST_TTL_S = 60, 6000
OWNER = ("worker-0", 3)
ONE, OTHER = range(7, 8), range(8, 9)


@pytest.fixture
async def requests(pipe: RedisPipe) -> RequestStore:
    """Holds one live request, "r", as sequence 7 of worker-0."""
    requests = RequestStore(pipe, RECORD_TTL_S, REQUEST_TTL_S)
    assert await requests.create("r", b"digest", b"body", OWNER, ONE) == (True, b"digest", 7)
    return requests


async def record(requests: RequestStore) -> RequestRecord:
    found = await requests.load("r")
    assert found is not None
    return found


async def test_create_writes_a_record_that_lives_as_long_as_a_request_may(
    server: RedisServer, requests: RequestStore
) -> None:
    assert await record(requests) == RequestRecord(b"body", b"digest", 7, "worker-0", 3, (("worker-0", (0,)),), b"")
    with server.client() as client:
        assert RECORD_TTL_S < client.ttl(request_key("r")) <= REQUEST_TTL_S


async def test_create_again_tells_whose_it_is_and_what_it_holds(server: RedisServer, requests: RequestStore) -> None:
    with server.client() as client:
        before = dump(client)
        assert await requests.create("r", b"digest", b"body", OWNER, ONE) == (True, b"digest", 7), "a lost reply"
        assert await requests.create("r", b"digest", b"body", OWNER, OTHER) == (False, b"digest", 7), "attach"
        assert await requests.create("r", b"other", b"else", OWNER, OTHER) == (False, b"digest", 7), "another body"
        assert dump(client) == before


async def test_nothing_is_known_of_other_requests(requests: RequestStore) -> None:
    assert await requests.load("unknown") is None
    assert await requests.own("unknown", OWNER, "worker-0", [0]) is False


async def test_own_raises_the_epoch_and_never_lowers_it(requests: RequestStore) -> None:
    assert await requests.own("r", ("worker-0", 5), "worker-0", [0])
    assert await requests.own("r", ("worker-0", 5), "worker-0", [0]), "a lost reply"
    with pytest.raises(OwnershipLostError, match="STALE epoch 4"):
        await requests.own("r", ("worker-0", 4), "worker-0", [0])
    assert (await record(requests)).placements == (("worker-0", (0,)),)


async def test_own_moves_a_request_once(requests: RequestStore) -> None:
    assert await requests.own("r", ("worker-1", 1), "worker-0", [12])
    assert await requests.own("r", ("worker-1", 1), "worker-0", [12]), "a lost reply"
    found = await record(requests)
    assert (found.worker, found.epoch) == ("worker-1", 1)
    assert found.placements == (("worker-0", (0,)), ("worker-1", (12,)))


async def test_own_follows_only_the_worker_that_holds_the_request(server: RedisServer, requests: RequestStore) -> None:
    await requests.own("r", ("worker-1", 1), "worker-0", [12])
    with server.client() as client:
        before = dump(client)
        with pytest.raises(OwnershipLostError, match="STALE the request is with worker-1"):
            await requests.own("r", ("worker-2", 9), "worker-0", [12])
        assert dump(client) == before


async def test_a_request_may_come_back_to_a_worker(requests: RequestStore) -> None:
    await requests.own("r", ("worker-1", 1), "worker-0", [12])
    assert await requests.own("r", ("worker-0", 8), "worker-1", [20])
    assert (await record(requests)).placements == (("worker-0", (0,)), ("worker-1", (12,)), ("worker-0", (20,)))


async def test_own_prolongs_a_live_request_and_leaves_an_ended_one(server: RedisServer, requests: RequestStore) -> None:
    with server.client() as client:
        client.expire(request_key("r"), 5)
        await requests.own("r", ("worker-0", 4), "worker-0", [0])
        assert client.ttl(request_key("r")) > RECORD_TTL_S
        await requests.end("r", ("worker-0", 4), b"end")
        before = dump(client)
        assert await requests.own("r", ("worker-1", 1), "worker-0", [3]) is False
        assert dump(client) == before
        assert client.ttl(request_key("r")) <= RECORD_TTL_S


async def test_end_is_written_once_by_the_owner(server: RedisServer, requests: RequestStore) -> None:
    for stranger in (("worker-0", 2), ("worker-0", 4), ("worker-1", 3)):
        with pytest.raises(OwnershipLostError, match="STALE the request is with worker-0 3"):
            await requests.end("r", stranger, b"other")
    assert await requests.end("r", OWNER, b"end") == b"end"
    assert await requests.end("r", OWNER, b"end") == b"end", "a lost reply"
    assert await requests.end("r", OWNER, b"another") == b"end"
    assert await requests.end("r", ("worker-1", 9), b"another") == b"end", "whoever asks hears what holds"
    assert (await record(requests)).end == b"end"
    with server.client() as client:
        assert 0 < client.ttl(request_key("r")) <= RECORD_TTL_S


async def test_the_end_of_an_unknown_request_is_refused(requests: RequestStore) -> None:
    with pytest.raises(OwnershipLostError, match="STALE"):
        await requests.end("unknown", OWNER, b"end")


async def test_every_choice_has_its_own_indexes(server: RedisServer, requests: RequestStore) -> None:
    await requests.create("three", b"digest", b"body", OWNER, range(7, 10))
    await requests.own("three", ("worker-1", 1), "worker-0", [2, 0, 1])
    found = await requests.load("three")
    assert found is not None
    assert found.num_choices == 3
    assert found.placements == (("worker-0", (0, 0, 0)), ("worker-1", (2, 0, 1)))
    with server.client() as client:
        client.set(log_key("worker-0", 7), b"".join(i.to_bytes(4, "little") for i in (10, 11)))
        client.set(log_key("worker-0", 9), (30).to_bytes(4, "little"))
        client.set(log_key("worker-1", 8), (20).to_bytes(4, "little"))
        client.set(log_key("worker-1", 9, 1), (31).to_bytes(4, "little"))
        assert await requests.load_logs(found) == [[10, 11], [20], [30, 31]]
        await requests.expire_logs(found)
        for key in (log_key("worker-0", 7), log_key("worker-1", 8), log_key("worker-1", 9, 1)):
            assert 0 < client.ttl(key) <= RECORD_TTL_S


async def test_output_is_read_over_all_placements(server: RedisServer, requests: RequestStore) -> None:
    """What a worker logged beyond the index at which its successor began does not count."""
    await requests.own("r", ("worker-1", 1), "worker-0", [2])
    await requests.own("r", ("worker-0", 8), "worker-1", [3])
    with server.client() as client:
        client.set(log_key("worker-0", 7), b"".join(i.to_bytes(4, "little") for i in (10, 11, 99)))
        client.set(log_key("worker-1", 7, 2), (12).to_bytes(4, "little"))
        client.set(log_key("worker-0", 7, 3), b"".join(i.to_bytes(4, "little") for i in (13, 14)))
        assert await requests.load_logs(await record(requests)) == [[10, 11, 12, 13, 14]]
        await requests.expire_logs(await record(requests))
        for worker, first_index in (("worker-0", 0), ("worker-1", 2), ("worker-0", 3)):
            assert 0 < client.ttl(log_key(worker, 7, first_index)) <= RECORD_TTL_S


async def test_seq_id_prefixes_are_unique_and_workers_are_remembered(requests: RequestStore) -> None:
    assert [await requests.next_seq_id_prefix() for _ in range(3)] == [1, 2, 3]
    for name in ("worker-1", "worker-0", "worker-1"):
        await requests.register_worker(name)
    assert await requests.worker_names() == ["worker-0", "worker-1"]


async def test_everything_of_a_request_expires(server: RedisServer, pipe: RedisPipe) -> None:
    requests = RequestStore(pipe, 1, 2)
    await requests.create("short", b"d", b"b", OWNER, range(1, 2))
    await requests.create("left", b"d", b"b", OWNER, range(2, 3))
    await requests.end("short", OWNER, b"end")
    with server.client() as client:
        assert 0 < client.pttl(request_key("short")) <= 1000
        assert 1000 < client.pttl(request_key("left")) <= 2000
