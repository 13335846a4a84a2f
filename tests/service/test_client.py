"""The client against a service that breaks off in every way: each token comes exactly once."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.client import PagodaClient, StreamError

TOKENS = list(range(100, 160))


class Scripted(generation_pb2_grpc.GenerationServicer):
    """Serves TOKENS, two a message; breaks off after as many messages as the script says for each call."""

    def __init__(self, breaks: list[int], code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE) -> None:
        self.breaks = breaks
        self.code = code
        self.calls: list[str] = []
        self.bad_index = False
        self.breaks_before_tokens = False

    async def Generate(self, request, context):  # noqa: N802
        self.calls.append(f"generate {request.request_id}")
        async for delta in self._serve(0, context):
            yield pb.GenerateResponse(request_id=request.request_id, delta=delta)

    async def Attach(self, request, context):  # noqa: N802
        self.calls.append(f"attach {list(request.next_index)}")
        async for delta in self._serve(request.next_index[0], context):
            yield pb.AttachResponse(request_id=request.request_id, delta=delta)

    async def _serve(self, start, context) -> AsyncIterator[pb.Delta | None]:
        num_messages = self.breaks.pop(0) if self.breaks else len(TOKENS)
        if num_messages > 0:
            yield None
        if self.breaks_before_tokens:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no worker came back in time")
        for index in range(start, len(TOKENS), 2):
            if num_messages == 0:
                if self.code is None:
                    return
                await context.abort(self.code, "going away")
            num_messages -= 1
            last = index + 2 >= len(TOKENS)
            yield pb.Delta(
                index=index + self.bad_index,
                token_ids=TOKENS[index : index + 2],
                text=f"<{index}>",
                finish_reason=pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED,
            )


async def start(servicer: Scripted) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def collect(client: PagodaClient, request: pb.GenerateRequest) -> tuple[list[int], str]:
    token_ids, text = [], ""
    async for delta in client.generate(request):
        token_ids += delta.token_ids
        text += delta.text
    return token_ids, text


async def test_a_stream_that_breaks_again_and_again_ends_whole():
    servicer = Scripted([0, 3, 1, 0, 5])
    server, address = await start(servicer)
    async with PagodaClient(address) as client:
        token_ids, text = await collect(client, pb.GenerateRequest(request_id="r", text="hi"))
    await server.stop(None)
    assert token_ids == TOKENS
    assert text == "".join(f"<{i}>" for i in range(0, len(TOKENS), 2))
    # Nothing was accepted by the first call: the same request again; afterwards only from where it was.
    assert servicer.calls == [
        "generate r", "generate r", "attach [6]", "attach [8]", "attach [8]", "attach [18]"
    ]  # fmt: skip


async def test_a_stream_that_ends_early_without_an_error_is_taken_up():
    server, address = await start(Scripted([4, 4], code=None))
    async with PagodaClient(address) as client:
        token_ids, _ = await collect(client, pb.GenerateRequest(text="hi"))
    await server.stop(None)
    assert token_ids == TOKENS


async def test_a_request_id_is_always_sent():
    servicer = Scripted([])
    server, address = await start(servicer)
    async with PagodaClient(address) as client:
        await collect(client, pb.GenerateRequest(text="hi"))
    await server.stop(None)
    assert len(servicer.calls[0].split()[1]) == 32


async def test_other_errors_are_the_callers():
    server, address = await start(Scripted([2], code=grpc.StatusCode.NOT_FOUND))
    async with PagodaClient(address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(client, pb.GenerateRequest(text="hi"))
    await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_gap_is_not_passed_on():
    servicer = Scripted([])
    servicer.bad_index = True
    server, address = await start(servicer)
    async with PagodaClient(address) as client:
        with pytest.raises(StreamError, match="token 0 of choice 0 was due, 1 came"):
            await collect(client, pb.GenerateRequest(text="hi"))
    await server.stop(None)


async def test_gives_up_in_time_on_a_service_that_stays_away():
    async with PagodaClient("127.0.0.1:1", give_up_s=0.3) as client:
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(client, pb.GenerateRequest(text="hi"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 3


async def test_gives_up_in_time_on_a_request_that_is_found_and_fails_each_time():
    servicer = Scripted([1] + [1] * 1000)
    server, address = await start(servicer)
    servicer.breaks_before_tokens = True
    began = time.monotonic()
    async with PagodaClient(address, give_up_s=0.5) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(client, pb.GenerateRequest(request_id="r"))
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 5
    assert len(servicer.calls) < 15
    await server.stop(0)


async def test_waiting_for_a_service_that_is_not_there_yet(unused_tcp_port):
    async with PagodaClient(f"127.0.0.1:{unused_tcp_port}") as client:
        waiting = asyncio.create_task(client.wait_serving())
        await asyncio.sleep(0.2)
        server = grpc.aio.server()
        state = health.aio.HealthServicer()
        await state.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        server.add_insecure_port(f"127.0.0.1:{unused_tcp_port}")
        await server.start()
        await asyncio.wait_for(waiting, 5)
        await server.stop(None)


async def test_the_deadline_is_of_it_all():
    server, address = await start(Scripted([2] + [0] * 1000))
    async with PagodaClient(address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.generate(pb.GenerateRequest(text="hi"), timeout_s=0.5):
                pass
    await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_is_serving_reads_the_health_service():
    server = grpc.aio.server()
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with PagodaClient(address) as client:
        await state.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not await client.is_serving()
        waiting = asyncio.create_task(client.wait_serving())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await state.set("", health_pb2.HealthCheckResponse.SERVING)
        await asyncio.wait_for(waiting, 5)
        assert await client.is_serving()
    await server.stop(None)


SLOW_SERVER = """
import asyncio, sys
import grpc
from pagoda.v1 import generation_pb2 as pb, generation_pb2_grpc
class Slow(generation_pb2_grpc.GenerationServicer):
    async def Generate(self, request, context):
        yield pb.GenerateResponse(request_id=request.request_id)
        async for delta in self.serve(0):
            yield pb.GenerateResponse(delta=delta)
    async def Attach(self, request, context):
        async for delta in self.serve(request.next_index[0]):
            yield pb.AttachResponse(delta=delta)
    async def serve(self, start):
        for index in range(start, 40):
            await asyncio.sleep(0.02)
            yield pb.Delta(index=index, token_ids=[index], finish_reason=2 if index == 39 else 0)
async def main():
    options = [("grpc.http2.min_recv_ping_interval_without_data_ms", 500), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    generation_pb2_grpc.add_GenerationServicer_to_server(Slow(), server)
    server.add_insecure_port("127.0.0.1:" + sys.argv[1])
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""


def spawn_slow_server(port: int) -> "subprocess.Popen[bytes]":
    protos = str(Path(__file__).parents[2] / "protos")
    environment = os.environ | {"PYTHONPATH": protos}
    return subprocess.Popen([sys.executable, "-c", SLOW_SERVER, str(port)], stdout=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_a_server_that_dies_or_stops_is_noticed_and_its_successor_found(how, unused_tcp_port):
    servers = [spawn_slow_server(unused_tcp_port)]
    await asyncio.to_thread(servers[0].stdout.readline)
    token_ids, longest_pause_s, last = [], 0.0, time.monotonic()
    try:
        async with PagodaClient(f"127.0.0.1:{unused_tcp_port}") as client:
            async for delta in client.generate(pb.GenerateRequest(text="hi")):
                token_ids += delta.token_ids
                longest_pause_s, last = max(longest_pause_s, time.monotonic() - last), time.monotonic()
                if len(token_ids) == 10 and len(servers) == 1:
                    servers[0].send_signal(how)
                    if how == signal.SIGSTOP:  # what a supervisor does with it after it has noticed
                        await asyncio.sleep(1)
                        servers[0].kill()
                    await asyncio.to_thread(servers[0].wait)
                    servers.append(spawn_slow_server(unused_tcp_port))
    finally:
        for server in servers:
            server.kill()
            server.wait()
            server.stdout.close()
    assert token_ids == list(range(40))
    assert longest_pause_s < 5


async def test_a_stopped_server_breaks_the_stream(unused_tcp_port):
    server = spawn_slow_server(unused_tcp_port)
    await asyncio.to_thread(server.stdout.readline)
    try:
        async with PagodaClient(f"127.0.0.1:{unused_tcp_port}", give_up_s=0) as client:
            with pytest.raises(grpc.aio.AioRpcError):  # noqa: PT012
                async for delta in client.generate(pb.GenerateRequest(text="hi")):
                    if delta.index == 5:
                        server.send_signal(signal.SIGSTOP)
                        began = time.monotonic()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert time.monotonic() - began < 4
