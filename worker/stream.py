"""One gRPC stream to a scheduler: an outbox that never blocks, and the messages down."""

import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
from pagoda.v1 import worker_pb2 as pb
from pagoda.v1 import worker_pb2_grpc

from worker.wire import StepOutput, encode_result

_MAX_MESSAGE_BYTES = 256 * 2**20
# A peer that is stopped, not dead, answers no ping: noticed within two seconds. ping_timeout_ms is what does it.
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class Stream:
    """One call of Connect, on a channel of its own: a new channel connects at once, an old one backs off."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.opened_s = time.monotonic()
        self.is_registered = False
        self.redirected_to: str | None = None
        self._outbox: SimpleQueue[pb.ConnectRequest | StepOutput | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._call = worker_pb2_grpc.WorkerLinkStub(self._channel).Connect(self._requests())

    def send(self, message: pb.ConnectRequest | StepOutput) -> None:
        """Queue a message up; never blocks."""
        self._outbox.put(message)

    def responses(self) -> Iterator[pb.ConnectResponse]:
        """Messages down, until the stream ends; raises grpc.RpcError."""
        return iter(self._call)

    def end(self) -> None:
        """Cancel the call; may be called from any thread, and again."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.ConnectRequest]:
        while (message := self._outbox.get()) is not None:
            yield encode_result(message) if isinstance(message, StepOutput) else message


def reason(error: grpc.RpcError) -> str:
    """One line."""
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {' '.join(str(error.details()).split())}"
    return " ".join(str(error).split())
