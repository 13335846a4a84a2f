"""What the service says and does while a part of it is away: health, bounded waits, and going on."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagoda.v1 import generation_pb2 as pb

from tests.service.calls import Stub, begun, failure
from tests.stack import Received, Stack, collect, running
from tests.timed import timed_request, timed_tokens

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LEASE_S = 1.0


@pytest.fixture
async def stack(timed_model: Path) -> AsyncIterator[Stack]:
    worker_flags = ("--timed-step-s", "0.004", "--num-blocks", "500")
    scheduler_flags = ("--lease-s", str(LEASE_S))
    async with running(Stack(timed_model, 1, scheduler_flags, worker_flags)) as stack:
        yield stack


class Health:
    """The standard health service, watched."""

    def __init__(self, channel: grpc.aio.Channel, service: str = "") -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._updates = health_pb2_grpc.HealthStub(channel).Watch(request)

    async def turns(self, status: int, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while (await self._updates.read()).status != status:
                pass


@contextlib.asynccontextmanager
async def watched(stack: Stack) -> AsyncIterator[Health]:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        health = Health(channel)
        await health.turns(SERVING, 5)
        yield health


async def test_before_the_first_worker_it_does_not_serve(timed_model: Path) -> None:
    stack = Stack(timed_model, 0, worker_flags=("--timed-step-s", "0.004"))
    async with running(stack), grpc.aio.insecure_channel(stack.address) as channel:
        checks = health_pb2_grpc.HealthStub(channel)
        for service in ("", "pagoda.v1.Generation"):
            response = await checks.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True)
            assert response.status == NOT_SERVING
        code, _ = await failure(checks.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert code is grpc.StatusCode.NOT_FOUND
        health = Health(channel, "pagoda.v1.Generation")
        stack.start_worker(0)
        await health.turns(SERVING, 10)


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
async def test_a_worker_that_stands_still_is_noticed_within_its_lease(stack: Stack, is_busy: bool) -> None:
    async with watched(stack) as health, stack.client() as client:
        reading = asyncio.create_task(collect(client, timed_request(1, 300 if is_busy else 1, resumable=True)))
        await stack.until(lambda s: s.workers[0].num_output_tokens > 0)
        with stack.stopped("worker-0"):
            await health.turns(NOT_SERVING, LEASE_S + 1)
        await health.turns(SERVING, 10)
        assert (await reading)[0] == timed_tokens(1, 300 if is_busy else 1)


async def test_a_worker_that_dies_is_noticed_at_once(stack: Stack) -> None:
    async with watched(stack) as health:
        stack.kill("worker-0")
        await health.turns(NOT_SERVING, 1)
        stack.start_worker(0)
        await health.turns(SERVING, 10)


async def test_a_redis_that_stands_still_is_noticed_though_nobody_asks(stack: Stack) -> None:
    async with watched(stack) as health:
        with stack.stopped("redis"):
            await health.turns(NOT_SERVING, 5)
        await health.turns(SERVING, 5)


async def test_redis_away_for_a_while(stack: Stack) -> None:
    """Streams pause and go on; new requests and questions are answered in bounded time; then everything is served."""
    async with watched(stack) as health, stack.client() as client:
        async with grpc.aio.insecure_channel(stack.address) as channel:
            stub = Stub(channel)
            await collect(client, timed_request(2, 5, request_id="before", resumable=True))
            received = Received()
            reading = asyncio.create_task(collect(client, timed_request(3, 400, resumable=True), received))
            await received.at_least(50)
            stack.kill("redis")
            await health.turns(NOT_SERVING, 3)
            began_s = time.monotonic()
            calls = (
                stub.Generate(timed_request(4, 5)),
                stub.Generate(timed_request(4, 5, request_id="named", resumable=True)),
                stub.Attach(pb.AttachRequest(request_id="before")),
                stub.Cancel(pb.CancelRequest(request_id="before")),
            )
            for code, details in await asyncio.gather(*(failure(call) for call in calls)):
                assert code is grpc.StatusCode.UNAVAILABLE
                assert "Redis" in details
            assert time.monotonic() - began_s < 7
            await stub.GetModel(pb.GetModelRequest())
            assert len((await stub.Tokenize(pb.TokenizeRequest(text="fox"))).token_ids) > 0
            assert not reading.done()
            stack.start_redis()
            await health.turns(SERVING, 5)
            assert (await reading)[0] == timed_tokens(3, 400)
            assert (await collect(client, timed_request(4, 5, request_id="named", resumable=True)))[0] == timed_tokens(
                4, 5
            )
        status = await stack.idle()
        assert status.workers[0].epoch == 1


async def test_redis_away_for_too_long(timed_model: Path) -> None:
    """A stream is not left waiting for ever: it ends with UNAVAILABLE, to be resumed."""
    flags = ("--timed-step-s", "0.004", "--num-blocks", "500")
    async with running(Stack(timed_model, 1, ("--worker-wait-s", "1.5"), flags)) as stack:
        async with grpc.aio.insecure_channel(stack.address) as channel, stack.client() as client:
            call = Stub(channel).Generate(timed_request(5, 500, request_id="long", resumable=True))
            await begun(call, 50)
            stack.kill("redis")
            code, details = await asyncio.wait_for(failure(call), 5)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "resume" in details
            stack.start_redis()
            token_ids = [token_id async for delta in client.attach("long") for token_id in delta.token_ids]
            assert token_ids == timed_tokens(5, 500)
        await stack.idle()
