"""A server that generates nothing: it delays by a known schedule, and keeps its own time of everything it sends.

The harness is held against it. `python -m tests.load.double OPTIONS` serves our contract and OpenAI's /v1/completions
on two ports, which it prints, and prints what it has seen since it was last asked, as JSON, for each line it reads.

Request k (in order of arrival) gets its first token after FIRST_S[k % 64], then one per GAP_S[j % 64]: both drawn once.
With `--fail-every N` every Nth request is refused, with a delay to come back after; every Nth after the first fails
after two tokens. `--stall-at-s` and `--stall-s`, from the first request's arrival: whatever was to be sent meanwhile,
the answer to a request that arrives then included, is sent at its end. With `--text-only` the HTTP side takes text
alone and no field beside OpenAI's own, and ends a stream without [DONE], as transformers serve does.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc.aio
import numpy as np
from aiohttp import web
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

RETRY_AFTER_S = 1.5
NUM_SCHEDULED = 64
VOCAB_SIZE = 500
OPENAI_FIELDS = {"model", "prompt", "max_tokens", "stream", "stream_options", "include_usage", "temperature"}
_RNG = np.random.default_rng(11)
FIRST_S = _RNG.uniform(0.2, 1.0, NUM_SCHEDULED)
GAP_S = _RNG.uniform(0.06, 0.14, NUM_SCHEDULED)


@dataclass(slots=True)
class Seen:
    """One request as the double saw it; times of the monotonic clock, taken right before a message was handed over."""

    arrived_s: float
    sent_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    how: str = "left"


class StoppedError(Exception):
    """The schedule says that a request fails here."""


class Schedule:
    """When each request's tokens are due. Owns what was seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seen: list[Seen] = []
        self._options = options

    def arrive(self) -> tuple[int, Seen]:
        """A request and its number."""
        self.seen.append(Seen(time.monotonic()))
        return len(self.seen) - 1, self.seen[-1]

    def is_refused(self, number: int) -> bool:
        """Whether it is refused at once."""
        every = self._options.fail_every
        return bool(every) and number % every == 0

    async def tokens(self, number: int, seen: Seen, num_tokens: int) -> AsyncIterator[int]:
        """Each token when it is due. Raises StoppedError."""
        due_s = seen.arrived_s + float(FIRST_S[number % NUM_SCHEDULED])
        every = self._options.fail_every
        for token in range(num_tokens):
            if every and number % every == 1 and token == 2:
                raise StoppedError
            await self._sleep_until(due_s)
            due_s += float(GAP_S[(number + token) % NUM_SCHEDULED])
            seen.sent_s.append(time.monotonic())
            yield token

    async def _sleep_until(self, due_s: float) -> None:
        options = self._options
        if options.stall_s:
            from_s = self.seen[0].arrived_s + options.stall_at_s
            if from_s <= due_s < from_s + options.stall_s:
                due_s = from_s + options.stall_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))


class Generation(generation_pb2_grpc.GenerationServicer):
    """Our contract, as far as a load generator needs it."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._running: dict[str, asyncio.Event] = {}

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        number, seen = self._schedule.arrive()
        if self._schedule.is_refused(number):
            seen.how = "refused"
            await context.abort_with_status(rpc_status.to_status(_refusal()))
        cancelled = self._running[request.request_id] = asyncio.Event()
        try:
            yield pb.GenerateResponse(request_id=request.request_id)
            max_tokens = request.sampling.max_tokens
            usage = pb.Usage(num_prompt_tokens=len(request.token_ids.ids), num_output_tokens=max_tokens)
            async for token in self._schedule.tokens(number, seen, max_tokens):
                delta = pb.Delta(index=token, token_ids=[token])
                if cancelled.is_set():
                    seen.how = "cancelled"
                    usage.num_output_tokens = token + 1
                    delta.finish_reason = pb.FINISH_REASON_ABORT
                elif token == max_tokens - 1:
                    seen.how = "completed"
                    delta.finish_reason = pb.FINISH_REASON_LENGTH
                if delta.finish_reason:
                    delta.usage.CopyFrom(usage)
                yield pb.GenerateResponse(request_id=request.request_id, delta=delta)
                if delta.finish_reason:
                    return
        except StoppedError:
            seen.how = "failed"
            await context.abort(grpc.StatusCode.INTERNAL, "the schedule says so")
        finally:
            seen.ended_s = time.monotonic()
            del self._running[request.request_id]

    async def Cancel(self, request: pb.CancelRequest, context: object) -> pb.CancelResponse:  # type: ignore[override]  # noqa: N802
        if request.request_id in self._running:
            self._running[request.request_id].set()
        return pb.CancelResponse(cancelled=request.request_id in self._running)

    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:  # type: ignore[override]  # noqa: N802
        return pb.GetModelResponse(name="double", vocab_size=VOCAB_SIZE, max_model_len=4096)

    async def GetStatus(self, request: pb.GetStatusRequest, context: object) -> pb.GetStatusResponse:  # type: ignore[override]  # noqa: N802
        num_running = len(self._running)
        worker = pb.WorkerStatus(
            name="w", state=pb.WORKER_STATE_LIVE, num_running=num_running, num_referenced_blocks=num_running,
            num_blocks=100, num_free_blocks=100 - num_running,
        )  # fmt: skip
        return pb.GetStatusResponse(workers=[worker], num_live_requests=num_running, num_streams=num_running)


def _refusal() -> status_pb2.Status:
    info = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="the schedule says so", details=[detail])


class Completions:
    """OpenAI's streaming completions, with usage as vLLM gives it, or with --text-only at the end."""

    def __init__(self, schedule: Schedule, text_only: bool) -> None:
        self._schedule = schedule
        self._text_only = text_only

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "double", "max_model_len": 4096}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        number, seen = self._schedule.arrive()
        body = await request.json()
        if self._schedule.is_refused(number):
            seen.how = "refused"
            return web.Response(status=429, text="the schedule says so", headers={"Retry-After": str(RETRY_AFTER_S)})
        unknown = (body.keys() | body["stream_options"].keys()) - OPENAI_FIELDS
        if self._text_only and (unknown or not isinstance(body["prompt"], str)):
            return web.Response(status=422, text=f"not OpenAI's own: {unknown}, or ids")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            async for token in self._schedule.tokens(number, seen, body["max_tokens"]):
                choice = {"index": 0, "text": f" {token}", "token_ids": [token]}
                usage = {} if self._text_only else {"usage": self._usage(body, token + 1)}
                await self._send(response, {"choices": [choice], **usage})
            ends = [{"index": 0, "text": "", "finish_reason": "length"}] if self._text_only else []
            await self._send(response, {"choices": ends, "usage": self._usage(body, body["max_tokens"])})
            if not self._text_only:
                await response.write(b"data: [DONE]\n\n")
            seen.how = "completed"
        except StoppedError:
            seen.how = "failed"
            await self._send(response, {"error": {"message": "the schedule says so"}})
        finally:
            seen.ended_s = time.monotonic()
        return response

    @staticmethod
    def _usage(body: dict[str, Any], num_tokens: int) -> dict[str, int]:
        """A word of text is a token."""
        prompt: list[int] | str = body["prompt"]
        words = prompt.split() if isinstance(prompt, str) else prompt
        return {"prompt_tokens": len(words), "completion_tokens": num_tokens}

    @staticmethod
    async def _send(response: web.StreamResponse, event: dict[str, object]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def serve(options: argparse.Namespace) -> None:
    """Serves until standard input ends; each line asks for what was seen."""
    schedule = Schedule(options)
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServicer_to_server(Generation(schedule), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    completions = Completions(schedule, options.text_only)
    app = web.Application()
    app.add_routes([web.get("/v1/models", completions.models), web.post("/v1/completions", completions.completions)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    http_port = runner.addresses[0][1]
    print(json.dumps({"grpc": grpc_port, "http": http_port}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps([asdict(seen) for seen in schedule.seen]), flush=True)
        schedule.seen.clear()
    await server.stop(0)
    await runner.cleanup()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--stall-at-s", type=float, default=0.0)
    parser.add_argument("--stall-s", type=float, default=0.0)
    parser.add_argument("--text-only", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
