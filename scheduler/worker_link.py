"""The gRPC face towards workers: one stream per incarnation. Knows messages, decides nothing."""

import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from pagoda.v1 import worker_pb2 as pb
from pagoda.v1 import worker_pb2_grpc

from scheduler.compatibility import RefusedError
from scheduler.engine import Engine
from scheduler.fleet import Fleet

log = logging.getLogger("pagoda.link")

HEARTBEAT_INTERVAL_S = 0.5
Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class StreamLink:
    """The engine's way down to one worker."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def send(self, plan: pb.StepPlan) -> None:
        """Writes one plan. Raises ConnectionError where the stream is broken."""
        try:
            await self._context.write(pb.ConnectResponse(plan=plan))
        except Exception as error:  # grpc.aio raises its own kinds, some undocumented, for a stream that has ended
            raise ConnectionError(str(error)) from error


class WorkerLinkService(worker_pb2_grpc.WorkerLinkServicer):
    """Takes registrations, hands results to the engine, and tells the fleet when a stream breaks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> None:
        """See worker.proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "register":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be register")
            return
        try:
            engine = await self._fleet.register(first.register, StreamLink(context))
        except RefusedError as error:
            log.warning("%s is refused: %s", first.register.worker_name, error.detail)
            await context.write(pb.ConnectResponse(refused=pb.Refused(reason=error.reason, detail=error.detail)))
            return
        registered = pb.Registered(
            epoch=engine.epoch,
            committed_step_id=engine.committer.committed_step_id,
            heartbeat_interval_s=HEARTBEAT_INTERVAL_S,
        )
        try:
            try:
                await context.write(pb.ConnectResponse(registered=registered))
            finally:
                self._fleet.serve(engine)  # also where the stream broke just now: the fleet has to see its loss
            await self._receive(request_iterator, engine)
        finally:
            engine.lose("its stream broke")

    async def _receive(self, messages: AsyncIterator[pb.ConnectRequest], engine: Engine) -> None:
        async for message in messages:
            if engine.is_lost:
                return
            kind = message.WhichOneof("message")
            if kind == "result":
                engine.on_result(message.result)
            elif kind == "heartbeat":
                engine.clock.on_heartbeat()
            elif kind == "swaps_done":
                engine.on_swaps_done(message.swaps_done)
            elif kind == "plans_dropped":
                engine.on_dropped(message.plans_dropped.step_ids)
            else:
                engine.lose(f"unexpected message {kind}")
                return
        engine.lose("its stream ended")
