"""Health that follows step progress, not the process: SERVING while some worker steps and Redis answers."""

import asyncio
import itertools

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from pagoda.v1 import generation_pb2

from scheduler.fleet import Fleet
from scheduler.redis_pipe import Pipe

INTERVAL_S = 0.1
TURNS_PER_PING = 10
MAX_REDIS_WAIT_S = 2.0
SERVICES = ("", generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name)


def is_healthy(fleet: Fleet, pipe: Pipe) -> bool:
    """Whether a request that comes now can be expected to make progress."""
    steps = any(engine.clock.overdue_s() == 0 for engine in fleet.engines)
    return steps and pipe.is_up and pipe.oldest_wait_s < MAX_REDIS_WAIT_S


async def follow_progress(servicer: health_aio.HealthServicer, fleet: Fleet, pipe: Pipe) -> None:
    """Keeps the standard health service up to date, for ever."""
    last: bool | None = None
    for turn in itertools.count():
        if turn % TURNS_PER_PING == 0:
            pipe.ping()
        healthy = is_healthy(fleet, pipe)
        if healthy is not last:
            status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in SERVICES:
                await servicer.set(service, status)
            last = healthy
        await asyncio.sleep(INTERVAL_S)
