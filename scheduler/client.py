"""A client of the service that takes its streams up again by itself, each token once.

Owns the connection and, per stream, how much has arrived. Needs the contract and gRPC, nothing else of Pagoda.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

if TYPE_CHECKING:
    _GenerateCall = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
    _AttachCall = grpc.aio.UnaryStreamCall[pb.AttachRequest, pb.AttachResponse]

# gRPC's health service by hand, for the sake of one dependency less: its messages are at most two bytes.
_HEALTH, _SERVING = "grpc.health.v1.Health", b"\x08\x01"
MAX_MESSAGE_BYTES = 64 << 20
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.02, 0.5
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that is stopped keeps its connection open: only unanswered pings tell, after about two seconds.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    # The second is also the time that one attempt to connect may take; it is 20 s by default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class StreamError(Exception):
    """The service broke its contract: a token is missing or came twice, or a stream ended before its request."""


@dataclass(slots=True)
class _Progress:
    """How much of a request has arrived."""

    num_choices: int
    accepted: bool = False
    next_index: list[int] = field(default_factory=list)
    reasons: dict[int, int] = field(default_factory=dict)
    retold: set[int] = field(default_factory=set)
    """Choices that had ended when the stream was taken up: it tells so once more."""

    def __post_init__(self) -> None:
        self.next_index = self.next_index or [0] * self.num_choices

    @property
    def ended(self) -> bool:
        return len(self.reasons) == self.num_choices

    def take_up(self) -> None:
        """A new stream goes on from here."""
        self.retold = set(self.reasons)

    def count(self, delta: pb.Delta) -> bool:
        """Takes a delta in; whether it is news. Raises StreamError where it does not follow what came before."""
        choice = delta.choice
        if choice >= self.num_choices:
            raise StreamError(f"there is no choice {choice}")
        if delta.index != self.next_index[choice]:
            raise StreamError(f"token {self.next_index[choice]} of choice {choice} was due, {delta.index} came")
        if choice in self.reasons:
            if choice not in self.retold or delta.token_ids or delta.finish_reason != self.reasons[choice]:
                raise StreamError(f"choice {choice} went on past its end")
            self.retold.remove(choice)
            return False
        self.next_index[choice] += len(delta.token_ids)
        if delta.finish_reason:
            self.reasons[choice] = delta.finish_reason
        return True


class PagodaClient:
    """Calls of the Generation service. Errors are grpc.aio.AioRpcError with the contract's statuses."""

    def __init__(self, address: str, give_up_s: float = 60.0) -> None:
        """`address`: host:port or unix:PATH. `give_up_s`: how long a stream may make no progress."""
        self._address = address
        self._give_up_s = give_up_s
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and what runs on it."""
        await self._channel.close()

    def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> AsyncIterator[pb.Delta]:
        """Runs a request to its end; goes on by itself when the service breaks off and comes back.

        Sets a request_id where there is none. `resumable` is the caller's to set: without it the service may
        drop the request while its client is away. `timeout_s` is the deadline of it all.
        """
        sent = pb.GenerateRequest()
        sent.CopyFrom(request)
        sent.request_id = request.request_id or uuid.uuid4().hex
        return self._follow(sent, _Progress(max(1, sent.n)), timeout_s)

    def attach(
        self,
        request_id: str,
        next_index: Sequence[int] = (0,),
        timeout_s: float | None = None,
        stream_interval: int = 0,
    ) -> AsyncIterator[pb.Delta]:
        """Goes on with a request from the given output index of each choice; the rest as in GenerateRequest."""
        progress = _Progress(len(next_index), accepted=True, next_index=list(next_index))
        request = pb.GenerateRequest(request_id=request_id, stream_interval=stream_interval)
        return self._follow(request, progress, timeout_s)

    async def _follow(
        self, request: pb.GenerateRequest, progress: _Progress, timeout_s: float | None
    ) -> AsyncIterator[pb.Delta]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        backoff_s, last_progress = FIRST_BACKOFF_S, time.monotonic()
        while True:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            call = self._open(request, progress, left_s)
            try:
                async for response in call:
                    if response.HasField("delta") or not progress.accepted:
                        backoff_s, last_progress = FIRST_BACKOFF_S, time.monotonic()
                    progress.accepted = True
                    if response.HasField("delta") and progress.count(response.delta):
                        yield response.delta
                if progress.ended:
                    return
                failure: Exception = StreamError("the stream ended before the request did")
            except grpc.aio.AioRpcError as error:
                if progress.ended and pb.FINISH_REASON_ERROR not in progress.reasons.values():
                    return
                if not is_broken(error):
                    raise
                failure = error
            finally:
                call.cancel()
            if time.monotonic() - last_progress > self._give_up_s:
                raise failure
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _open(
        self, request: pb.GenerateRequest, progress: _Progress, timeout_s: float | None
    ) -> "_GenerateCall | _AttachCall":
        if not progress.accepted:
            return self._stub.Generate(request, timeout=timeout_s)
        progress.take_up()
        attach = pb.AttachRequest(
            request_id=request.request_id, next_index=progress.next_index, stream_interval=request.stream_interval
        )
        return self._stub.Attach(attach, timeout=timeout_s)

    async def cancel(self, request_id: str, timeout_s: float = 10.0) -> bool:
        """Ends a request; False where it had ended before."""
        response = await self._stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=timeout_s)
        return response.cancelled

    async def get_model(self, timeout_s: float = 10.0) -> pb.GetModelResponse:
        """What is served."""
        return await self._stub.GetModel(pb.GetModelRequest(), timeout=timeout_s)

    async def get_status(self, timeout_s: float = 10.0) -> pb.GetStatusResponse:
        """The workers, their blocks and queues."""
        return await self._stub.GetStatus(pb.GetStatusRequest(), timeout=timeout_s)

    async def get_blocks(self, worker: str = "", timeout_s: float = 10.0) -> pb.GetBlocksResponse:
        """Every block of a worker's pool, or of all."""
        return await self._stub.GetBlocks(pb.GetBlocksRequest(worker=worker), timeout=timeout_s)

    async def explain(self, request_id: str, timeout_s: float = 10.0) -> pb.ExplainResponse:
        """Where the blocks of a request's prompt came from."""
        return await self._stub.Explain(pb.ExplainRequest(request_id=request_id), timeout=timeout_s)

    async def unpin(self, request_id: str, timeout_s: float = 10.0) -> int:
        """Lets go of what a request pinned; how many blocks that were."""
        response = await self._stub.Unpin(pb.UnpinRequest(request_id=request_id), timeout=timeout_s)
        return response.num_blocks

    async def tokenize(self, text: str, timeout_s: float = 10.0) -> list[int]:
        """The ids of a text, as generate would use them."""
        response = await self._stub.Tokenize(pb.TokenizeRequest(text=text), timeout=timeout_s)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], timeout_s: float = 10.0) -> str:
        """The text of ids."""
        response = await self._stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), timeout=timeout_s)
        return response.text

    async def is_serving(self, timeout_s: float = 1.0) -> bool:
        """Whether the service can take requests now."""
        check: Any = self._channel.unary_unary(f"/{_HEALTH}/Check")
        try:
            return bytes(await check(b"", timeout=timeout_s)) == _SERVING
        except grpc.aio.AioRpcError:
            return False

    async def wait_serving(self) -> None:
        """Waits until the service can take requests, however long it takes to come."""
        watch: Any = self._channel.unary_stream(f"/{_HEALTH}/Watch")
        while True:
            with suppress(grpc.aio.AioRpcError):
                async for status in watch(b""):
                    if bytes(status) == _SERVING:
                        return
            await asyncio.sleep(FIRST_BACKOFF_S)


def is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection or the scheduler failed, not the request: a resuming client goes on."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    # A connection that breaks in mid-message shows as these, with gRPC's own text.
    details = error.details() or ""
    return error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED) and (
        "RST_STREAM" in details or details.startswith("Stream removed")
    )
