"""The gRPC face towards clients: accepts requests, attaches streams, answers questions. No decisions about steps."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import grpc
import grpc.aio
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.delivery import Delivery
from scheduler.engine import Engine
from scheduler.errors import AlreadyExistsError, NotFoundError, PinBudgetError, QueueFullError, UnavailableError
from scheduler.explain import Explanation, to_response
from scheduler.fleet import Fleet
from scheduler.live_request import Ending, LiveRequest, LiveRequests
from scheduler.place import Place
from scheduler.pool_map import blocks_of
from scheduler.recovery import Reviver
from scheduler.request import RequestBody
from scheduler.request_store import OwnershipLostError, RequestStore
from scheduler.retry_delay import RetryDelay
from scheduler.sequence import FinishReason
from scheduler.status import ServedModel, status_of
from scheduler.tokenizer import Tokenizer
from scheduler.validation import Limits, check_token_ids, encode_prompt, validate

STORE_TIMEOUT_S = 5.0
"""How long a call waits for Redis before it is told UNAVAILABLE."""
LONG_REQUEST_BYTES = 4096
_T = TypeVar("_T")
Context = grpc.aio.ServicerContext[object, object]


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """See generation.proto."""

    def __init__(
        self, model: ServedModel, fleet: Fleet, requests: RequestStore, reviver: Reviver, live_requests: LiveRequests
    ) -> None:
        self._model = model
        self._tokenizer: Tokenizer = model.tokenizer
        self._fleet = fleet
        self._requests = requests
        self._reviver = reviver
        self._live_requests = live_requests
        self._delivery = Delivery(model.tokenizer)
        self._first_seq_id = self._next_seq_id = 0
        self._accepting: dict[str, _Acceptance] = {}
        self._retry_delay = RetryDelay()

    async def start(self) -> None:
        """Draws the prefix of this scheduler's seq_ids."""
        self._first_seq_id = self._next_seq_id = await self._requests.next_seq_id_prefix() << 32

    # -- streams ------------------------------------------------------------------------------------------------------

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Runs a request, or attaches to the one of the same id and body."""
        await self._fleet.wait_for_worker()
        body = await self._validate(request)
        live = await self._find(body.request_id) or await self._accept(body)
        if live.body.digest != body.digest:
            raise AlreadyExistsError(f"request_id: {body.request_id!r} is another request; choose another id")
        async with _Attached(self._live_requests, live, request.stream_interval):
            while not (live.is_accepted or live.is_over or live.is_orphaned):
                await live.changed()
            yield pb.GenerateResponse(request_id=body.request_id)
            async for delta in self._delivery.deltas(live, (), request.stream_interval):
                yield pb.GenerateResponse(request_id=body.request_id, delta=delta)

    async def Attach(  # noqa: N802
        self, request: pb.AttachRequest, context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """Goes on with a stream."""
        live = await self._find(request.request_id)
        if live is None:
            raise _unknown(request.request_id)
        async with _Attached(self._live_requests, live, request.stream_interval):
            yield pb.AttachResponse(request_id=request.request_id)
            async for delta in self._delivery.deltas(live, request.next_index, request.stream_interval):
                yield pb.AttachResponse(request_id=request.request_id, delta=delta)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        """Ends a request now."""
        live = await self._find(request.request_id)
        if live is None:
            raise _unknown(request.request_id)
        if all(choice.end is not None or choice.ending is not None for choice in live.choices):
            return pb.CancelResponse(cancelled=False)
        self._fleet.end(live, Ending(FinishReason.ABORT))
        return pb.CancelResponse(cancelled=True)

    async def _validate(self, request: pb.GenerateRequest) -> RequestBody:
        """Long texts are tokenized beside the loop, so that no stream waits for them."""
        if request.ByteSize() < LONG_REQUEST_BYTES:
            return validate(request, self._tokenizer, self._limits())
        return await asyncio.to_thread(validate, request, self._tokenizer, self._limits())

    # -- accepting ----------------------------------------------------------------------------------------------------

    async def _find(self, request_id: str) -> LiveRequest | None:
        """A request that is live here, or is over and not expired; waits for one whose worker is being taken over."""
        live = self._live_requests.get(request_id)
        if live is not None:
            return live
        record = await _in_time(self._requests.load(request_id))
        if record is None:
            return None
        if record.end:
            return self._reviver.ended(record, await _in_time(self._requests.load_logs(record)))
        await self._fleet.wait_until_resolved(record.worker)
        live = self._live_requests.get(request_id)
        if live is None:
            return await self._find_orphan(request_id)
        return live

    async def _find_orphan(self, request_id: str) -> LiveRequest | None:
        """A record whose owner died between writing it and enrolling it: nothing has run, so it is accepted again."""
        record = await _in_time(self._requests.load(request_id))
        if record is None:
            return None
        if record.end:
            return self._reviver.ended(record, await _in_time(self._requests.load_logs(record)))
        if await _in_time(self._requests.is_enrolled(record.worker, record.seq_id)):
            raise UnavailableError("the request's worker is being taken over; resume it in a moment")
        live = self._live_requests.get(request_id)
        if live is None:
            live = self._reviver.create(RequestBody.from_bytes(record.body, record.digest), record.seq_id)
            with self._fleet.place(live) as place:
                await self._open(live, place, (record.worker, record.epoch))
        return live

    async def _accept(self, body: RequestBody) -> LiveRequest:
        """A new request, durable. A client that leaves meanwhile leaves it as one that was accepted, not half made."""
        live = self._live_requests.get(body.request_id)
        if live is not None:
            return live  # the same request came twice at once, and the other was faster
        acceptance = self._accepting.get(body.request_id) or self._begin_accepting(body)
        acceptance.num_waiting += 1
        try:
            live = await asyncio.shield(acceptance.task)
        except asyncio.CancelledError:
            acceptance.task.add_done_callback(lambda _: self._expect_client(acceptance))
            raise
        finally:
            acceptance.num_waiting -= 1
        return live

    def _begin_accepting(self, body: RequestBody) -> "_Acceptance":
        num_waiting = len(self._accepting) + len(self._live_requests)
        num_waiting -= sum(engine.planner.num_running_requests for engine in self._fleet.engines)
        now_s = monotonic()
        self._retry_delay.note(now_s, num_waiting)
        if num_waiting >= self._model.max_waiting:
            raise QueueFullError(num_waiting, self._retry_delay.refuse(now_s, num_waiting))
        self._retry_delay.accept()
        acceptance = self._accepting[body.request_id] = _Acceptance(asyncio.create_task(self._create(body)))
        acceptance.task.add_done_callback(lambda _: self._accepting.pop(body.request_id))
        return acceptance

    def _expect_client(self, acceptance: "_Acceptance") -> None:
        task = acceptance.task
        if not task.cancelled() and task.exception() is None and acceptance.num_waiting == 0:
            self._live_requests.expect_client(task.result())

    async def _create(self, body: RequestBody) -> LiveRequest:
        """Makes a request ours and durable, and gives it to a worker."""
        seq_ids = range(self._next_seq_id, self._next_seq_id + body.num_sequences)
        self._next_seq_id = seq_ids.stop
        live = self._reviver.create(body, seq_ids.start)
        self._fleet.metrics.note_arrival(live)
        with self._fleet.place(live) as place:
            engine = place.engine()
            if engine is None:
                raise UnavailableError("the last worker was lost just now; try again")
            _check_pin_budget(body, engine)
            owner = engine.committer.owner
            is_ours, held_digest, _ = await _in_time(
                self._requests.create(body.request_id, body.digest, body.to_bytes(), owner, seq_ids)
            )
            if not is_ours:
                if held_digest != body.digest:
                    raise AlreadyExistsError(f"request_id: {body.request_id!r} is another request; choose another id")
                raise UnavailableError("the same request is being accepted just now; send it again")
            await self._open(live, place, owner)
        return live

    async def _open(self, live: LiveRequest, place: Place, recorded_owner: tuple[str, int]) -> None:
        """Gives a request that has a record to a live worker, and lets its record say so."""
        self._live_requests.add(live)
        try:
            engine = await self._own(live, place, recorded_owner)
        except (UnavailableError, OwnershipLostError):
            live.is_orphaned = True
            live.notify()
            self._live_requests.discard(live)
            raise UnavailableError("no worker can take the request just now; try again") from None
        engine.open(live)

    async def _own(self, live: LiveRequest, place: Place, recorded_owner: tuple[str, int]) -> Engine:
        """The engine that the record names. It was not lost while that was written: what is opened there now counts."""
        while True:
            engine = place.engine()
            if engine is None:
                raise UnavailableError("no worker is there")
            owner = engine.committer.owner
            if owner == recorded_owner:
                return engine
            await _in_time(
                self._requests.own(live.body.request_id, owner, recorded_owner[0], [0] * live.body.num_sequences)
            )
            recorded_owner = owner

    def _limits(self) -> Limits:
        pools = [e.planner.blocks.num_blocks * e.planner.limits.block_size for e in self._fleet.engines]
        max_pool_tokens = min(pools, default=self._model.max_model_len)
        return Limits(self._model.max_model_len, max_pool_tokens, block_size=self._model.block_size)

    # -- questions ----------------------------------------------------------------------------------------------------

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """Describes the model."""
        return self._model.describe()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """Describes workers and queues."""
        return status_of(self._fleet, self._live_requests, self._delivery.gate.busy_s)

    async def GetBlocks(self, request: pb.GetBlocksRequest, context: Context) -> pb.GetBlocksResponse:  # noqa: N802
        """Describes every block."""
        return await blocks_of(self._fleet, request.worker)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:  # noqa: N802
        """Says where a prompt's blocks came from."""
        request_id = request.request_id
        live = self._live_requests.get(request_id)
        if live is not None:
            has_ended, is_earlier = live.is_over, True
            explanation: Explanation | None = Explanation.of(live)
        else:
            record = await _in_time(self._requests.load(request_id))
            if record is None:
                raise _unknown(request_id)
            has_ended, is_earlier = True, record.seq_id < self._first_seq_id
            explanation = self._fleet.explanations.get(request_id)
        if explanation is None or explanation.is_forgotten:
            why = "it was admitted by an earlier scheduler" if is_earlier else "too many requests have ended since"
            raise NotFoundError(f"request_id: where the blocks of {request_id!r} came from is not known here: {why}")
        return to_response(request_id, explanation, self._model.block_size, has_ended)

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:  # noqa: N802
        """Lets go of what a request pinned."""
        num_blocks = 0
        for engine in self._fleet.engines:
            num_blocks += engine.planner.pins.end(request.request_id)
            engine.look_again()
        if not num_blocks:
            raise NotFoundError(f"request_id: {request.request_id!r} has nothing pinned; it may have expired")
        return pb.UnpinResponse(num_blocks=num_blocks)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text to ids."""
        return pb.TokenizeResponse(token_ids=encode_prompt(request, self._tokenizer))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Ids to text."""
        check_token_ids("token_ids", request.token_ids, self._tokenizer)
        return pb.DetokenizeResponse(text=self._tokenizer.decode(request.token_ids))


def _check_pin_budget(body: RequestBody, engine: Engine) -> None:
    """Raises PinBudgetError where a prompt that is to be pinned does not fit beside what is."""
    pins, num_blocks = engine.planner.pins, len(body.prompt_token_ids) // engine.planner.limits.block_size
    if body.pin_prompt_s and num_blocks > pins.num_blocks_left:
        raise PinBudgetError(
            f"pin_prompt_s: {num_blocks} blocks are to be pinned, {max(0, pins.num_blocks_left)} of the budget of "
            f"{pins.max_blocks} are left on {engine.worker}; unpin some, or raise --pin-memory"
        )


def _unknown(request_id: str) -> NotFoundError:
    return NotFoundError(f"request_id: no request {request_id!r}; it never was, or it has expired")


@dataclass(slots=True, eq=False)
class _Acceptance:
    """A request that is being made durable, and how many calls wait for that."""

    task: asyncio.Task[LiveRequest]
    num_waiting: int = 0


class _Attached:
    """Counts a stream as a request's client while it lasts."""

    def __init__(self, live_requests: LiveRequests, live: LiveRequest, stream_interval: int) -> None:
        self._live_requests = live_requests
        self._live = live
        self._stream_interval = max(1, stream_interval)

    async def __aenter__(self) -> None:
        self._live_requests.attach(self._live, self._stream_interval)

    async def __aexit__(self, *_: object) -> None:
        self._live_requests.detach(self._live, self._stream_interval)


async def _in_time(work: Awaitable[_T]) -> _T:
    """Redis's answer. Raises UnavailableError where it does not come."""
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            return await work
    except TimeoutError:
        raise UnavailableError("Redis does not answer; try again later") from None
