"""Looks at a Redis before it is trusted with the truth."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping

from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import RedisError

from scheduler.config import ConfigError
from scheduler.redis_slots import ClusterUrl, fetch_owners

log = logging.getLogger("pagoda.redis")

MIN_VERSION = (6, 2)
START_TIMEOUT_S = 5.0
TIMEOUT_S = 2.0
RETRY_DELAY_S = 0.02


async def check_redis(url: str) -> bool:
    """Whether it is a Redis Cluster. Raises ConfigError for what is out of reach, too old, evicts or lacks slots.

    A node of a cluster that is out of reach is no reason: its replica may take over.
    """
    try:
        cluster_url = ClusterUrl(url)
        client = Redis.from_pool(cluster_url.pool(None, TIMEOUT_S, TIMEOUT_S))
    except ValueError as error:
        raise ConfigError(f"--redis-url: {error}") from None
    try:
        info = await _info(client)
        await _check_server(client, info, "")
    finally:
        await client.aclose()
    if not info.get("cluster_enabled"):
        return False
    await _check_nodes(cluster_url)
    return True


async def _check_nodes(url: ClusterUrl) -> None:
    """All masters of a cluster: a part of the workers will be with each of them."""
    owners = await fetch_owners(url, ())
    num_slots = sum(len(slots) for slots, _ in owners)
    if num_slots < REDIS_CLUSTER_HASH_SLOTS:
        raise ConfigError(
            f"--redis-url: nobody owns {REDIS_CLUSTER_HASH_SLOTS - num_slots} of the cluster's slots; assign them"
        )
    for address in sorted({address for _, address in owners}):
        client = Redis.from_pool(url.pool(address, TIMEOUT_S, TIMEOUT_S))
        which = "node {}:{} of the cluster: ".format(*address)
        try:
            await _check_server(client, await client.info(), which)
        except (RedisError, OSError) as error:
            log.warning("%sout of reach (%s)", which, error)
        finally:
            await client.aclose()


async def _check_server(client: "Redis", info: Mapping[str, object], which: str) -> None:
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < MIN_VERSION:
        raise ConfigError(f"--redis-url: {which}version {info['redis_version']} is too old; 6.2 or newer is needed")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise ConfigError(
            f"--redis-url: {which}its maxmemory-policy is {policy}, which drops live requests; set it to noeviction"
        )
    await _warn_of_late_writes(client)


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
