"""Looks at a Redis before it is trusted with the truth."""

import asyncio
import contextlib
import logging
import re

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scheduler.config import ConfigError

log = logging.getLogger("pagoda.redis")

MIN_VERSION = (6, 2)
START_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.02


async def check_redis(url: str) -> None:
    """Raises ConfigError for a Redis that is out of reach, too old, evicts what it holds, or is a part of a cluster."""
    try:
        client = Redis.from_url(
            url, decode_responses=True, retry=Retry(NoBackoff(), 0), socket_timeout=2.0, socket_connect_timeout=2.0
        )
    except ValueError as error:
        raise ConfigError(f"--redis-url: {error}") from None
    try:
        info = await _info(client)
        version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
        if version < MIN_VERSION:
            raise ConfigError(f"--redis-url: version {info['redis_version']} is too old; 6.2 or newer is needed")
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if policy != "noeviction":
            raise ConfigError(
                f"--redis-url: its maxmemory-policy is {policy}, which drops live requests; set it to noeviction"
            )
        if info.get("cluster_enabled"):
            await _refuse_part_of_cluster(client)
        await _warn_of_late_writes(client)
    finally:
        await client.aclose()


async def _refuse_part_of_cluster(client: "Redis") -> None:
    """A connection to one node would be told MOVED for most keys, and would wait for ever."""
    cluster = await client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    num_nodes = int(dict(cluster)["cluster_size"])
    if num_nodes != 1:
        raise ConfigError(
            f"--redis-url: a Redis Cluster of {num_nodes} nodes is not served yet; give it a Redis of its own"
        )


async def _warn_of_late_writes(client: "Redis") -> None:
    """With everysec, a Redis whose disk is slow answers before it has written, for up to two seconds."""
    with contextlib.suppress(RedisError):  # CONFIG may be forbidden
        config = await client.config_get("appendonly", "appendfsync")
        if config.get("appendonly") == "yes" and config.get("appendfsync") == "everysec":
            log.warning(
                "appendfsync is everysec: a Redis that is killed may lose what it acknowledged; set no or always"
            )


async def _info(client: "Redis") -> dict[str, object]:
    """INFO, waiting a little for a server that is starting."""
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        try:
            info: dict[str, object] = await client.info()
            return info
        except (RedisError, OSError) as error:
            if asyncio.get_running_loop().time() > deadline:
                reason = re.sub(r"\s+", " ", str(error))
                raise ConfigError(
                    f"--redis-url: can't be reached ({reason}); start it, or leave the flag out"
                ) from None
            await asyncio.sleep(RETRY_DELAY_S)
