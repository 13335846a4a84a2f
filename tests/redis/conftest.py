"""One server of each kind for the whole session, emptied between tests."""

from collections.abc import AsyncIterator, Iterator

import pytest

from scheduler.redis_pipe import RedisPipe
from scheduler.scripts import ALL_SCRIPTS
from tests.redis_servers import RedisServer, server_binaries

_servers: dict[str, RedisServer] = {}


@pytest.fixture(scope="session", params=["valkey", "redis6", "redis"])
def shared_server(request: pytest.FixtureRequest) -> RedisServer:
    kind: str = request.param
    if kind not in server_binaries():
        pytest.skip(f"no {kind} server on this machine")
    if kind not in _servers:
        _servers[kind] = RedisServer(kind).start()
    return _servers[kind]


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """A server of each kind, empty."""
    shared_server.flush()
    return shared_server


@pytest.fixture
async def pipe(server: RedisServer) -> AsyncIterator[RedisPipe]:
    """A pipe to it."""
    pipe = RedisPipe(server.url, ALL_SCRIPTS)
    pipe.start()
    yield pipe
    await pipe.close()


@pytest.fixture
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """An embedded server of the test's own, to be hurt: append-only, every write synced before its reply."""
    server = RedisServer("valkey", "--appendonly", "yes", "--appendfsync", "always").start()
    yield server
    server.close()
