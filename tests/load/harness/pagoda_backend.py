"""Our own service, through the client that everybody uses."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient, StreamError
from tests.load.harness.backend import Call, CallError, Chunk, ServerSample, Usage
from tests.load.harness.errors import LoadError
from tests.load.harness.settings import Target
from tests.load.harness.workload import ServedModel

GIVE_UP_S = 10.0
"""How long a stream may be without the scheduler before it counts as UNAVAILABLE."""
CANCEL_TIMEOUT_S = 10.0
SAMPLE_TIMEOUT_S = 2.0
_DETAILS_KEY = "grpc-status-details-bin"
_TOTALS = (
    "num_prefix_query_tokens", "num_prefix_hit_tokens", "num_host_hit_tokens", "num_preemptions", "num_steps",
    "num_step_tokens", "num_output_tokens", "num_commits", "num_blocks_swapped_out", "num_blocks_swapped_in",
)  # fmt: skip


class PagodaBackend:
    """See Backend."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = PagodaClient(target.address, GIVE_UP_S)

    async def model(self) -> ServedModel:
        """See Backend."""
        try:
            model = await self._client.get_model()
        except grpc.aio.AioRpcError as error:
            raise LoadError(f"no answer from {self._target.address}: {error.details()}") from None
        vocab_size = self._target.vocab_size or model.vocab_size
        return ServedModel(model.name, vocab_size, model.max_model_len, tuple(model.eos_token_ids))

    async def stream(self, call: Call) -> AsyncIterator[Chunk]:
        """See Backend."""
        deltas = self._client.generate(self._request(call), self._target.request_timeout_s)
        try:
            async with aclosing(deltas):  # type: ignore[type-var]
                async for delta in deltas:
                    yield _chunk(delta, call.needs_ids)
        except grpc.aio.AioRpcError as error:
            raise CallError(error.code().name, error.details() or "", retry_after_s(error)) from None
        except StreamError as error:
            raise CallError("DATA_LOSS", str(error)) from None

    def _request(self, call: Call) -> pb.GenerateRequest:
        target = self._target
        sampling = pb.SamplingParams(max_tokens=call.max_tokens, ignore_eos=target.ignore_eos)
        if target.temperature is not None:
            sampling.temperature = target.temperature
        return pb.GenerateRequest(
            request_id=call.request_id,
            token_ids=pb.TokenIds(ids=call.token_ids),
            sampling=sampling,
            stream_interval=target.stream_interval,
        )

    async def cancel(self, request_id: str) -> None:
        """See Backend."""
        with suppress(grpc.aio.AioRpcError):  # NOT_FOUND: it was refused, or has expired; its own stream says so
            await self._client.cancel(request_id, CANCEL_TIMEOUT_S)

    async def sample(self) -> ServerSample | None:
        """See Backend."""
        try:
            status = await self._client.get_status(SAMPLE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        return to_sample(status, time.monotonic())

    async def close(self) -> None:
        """See Backend."""
        await self._client.close()


def _chunk(delta: pb.Delta, needs_ids: bool) -> Chunk:
    num_tokens = len(delta.token_ids)
    token_ids = list(delta.token_ids) if needs_ids else ()
    if not delta.finish_reason:
        return Chunk(num_tokens, token_ids)
    usage = Usage(delta.usage.num_prompt_tokens, delta.usage.num_cached_tokens, delta.usage.num_output_tokens)
    return Chunk(num_tokens, token_ids, usage, delta.finish_reason == pb.FINISH_REASON_ABORT)


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """What google.rpc.RetryInfo in the status details says, seconds; None where there is none."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            info = error_details_pb2.RetryInfo()
            if any(detail.Unpack(info) for detail in status_pb2.Status.FromString(value).details):
                return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


def to_sample(status: pb.GetStatusResponse, at_s: float) -> ServerSample:
    """Sums over the workers that are live."""
    live = [worker for worker in status.workers if worker.state == pb.WORKER_STATE_LIVE]
    blocks = {
        "free": sum(worker.num_free_blocks for worker in live),
        "referenced": sum(worker.num_referenced_blocks for worker in live),
        "cached": sum(worker.num_cached_blocks for worker in live),
    }
    if any(worker.num_host_blocks for worker in live):
        blocks["host_free"] = sum(worker.num_free_host_blocks for worker in live)
        blocks["host_cached"] = sum(worker.num_cached_host_blocks for worker in live)
    totals = {name: float(sum(getattr(worker, name) for worker in live)) for name in _TOTALS}
    return ServerSample(
        at_s,
        num_running=sum(worker.num_running for worker in live),
        num_waiting=sum(worker.num_waiting for worker in live),
        num_live_requests=status.num_live_requests,
        num_streams=status.num_streams,
        blocks=blocks,
        totals=totals | {"scheduler_cpu_s": status.scheduler_cpu_s, "delivery_s": status.delivery_s},
    )
