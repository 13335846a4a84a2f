"""Looks at a Redis before it is trusted with the truth."""

import asyncio
import re

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scheduler.config import ConfigError

MIN_VERSION = (6, 2)
START_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.02


async def check_redis(url: str) -> None:
    """Raises ConfigError for a Redis that is out of reach, older than 6.2, or that would evict what it holds."""
    try:
        client = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=2.0, socket_connect_timeout=2.0)
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
    finally:
        await client.aclose()


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
