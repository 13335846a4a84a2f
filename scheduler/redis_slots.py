"""Which node of a Redis Cluster owns which slots, asked of any node that answers; and how to connect to each."""

from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.cluster import parse_cluster_slots
from redis.exceptions import RedisError

Address = tuple[str, int]
"""Host and port."""
ASK_TIMEOUT_S = 1.0
LOCALHOST = "127.0.0.1"


class ClusterUrl:
    """The URL of one node, which says how to connect to all of them: with the same names, passwords and encryption."""

    def __init__(self, url: str) -> None:
        self._seed: dict[str, Any] = dict(parse_url(url))
        self._options = {k: v for k, v in self._seed.items() if k not in ("host", "port", "path", "db")}
        if "path" in self._seed:  # a socket on this machine; the others are reached by their ports
            del self._options["connection_class"]
        self.host = str(self._seed.get("host", LOCALHOST))

    def pool(self, address: Address | None, reply_timeout_s: float | None, connect_timeout_s: float) -> ConnectionPool:
        """Makes connections to a node; None is the one that the URL names."""
        options = self._seed if address is None else {**self._options, "host": address[0], "port": address[1]}
        return ConnectionPool(
            **options,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=reply_timeout_s,
            socket_connect_timeout=connect_timeout_s,
        )


async def fetch_owners(url: ClusterUrl, known: Iterable[Address]) -> list[tuple[range, Address]]:
    """(slots, the master that owns them), as the first of the known nodes says that knows; empty where none does."""
    for address in (*known, None):
        client = Redis.from_pool(url.pool(address, ASK_TIMEOUT_S, ASK_TIMEOUT_S))
        host = url.host if address is None else address[0]
        try:
            reply = await client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            continue
        finally:
            await client.aclose()
        owners = parse_cluster_slots(reply, current_host=host)
        if owners:
            return [(range(first, last + 1), owner["primary"]) for (first, last), owner in owners.items()]
    return []
