"""Turns every failure of a call into a gRPC status, in one place: the table in errors.py, INTERNAL for our bugs.

Where it is known when to come back, the status's details have a google.rpc.RetryInfo.
"""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from scheduler.errors import STATUS_OF, RequestError

log = logging.getLogger("pagoda.service")


class ErrorsToStatus(grpc.aio.ServerInterceptor):
    """To be given to grpc.aio.server(interceptors=...). `count`: is told of each status that it gives."""

    def __init__(self, count: Callable[[grpc.StatusCode], None]) -> None:
        self._count = count

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The same handler, whose exceptions end the call with their status."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            if not inspect.isasyncgenfunction(handler.unary_stream):
                return handler
            return handler._replace(unary_stream=_stream(handler.unary_stream, self._count))
        return handler._replace(unary_unary=_call(handler.unary_unary, self._count))


def _stream(
    serve: Callable[..., AsyncIterator[Any]], count: Callable[[grpc.StatusCode], None]
) -> Callable[..., AsyncIterator[Any]]:
    async def checked(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in serve(request, context):
                yield response
        except RequestError as error:
            count(STATUS_OF[type(error)])
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            count(grpc.StatusCode.INTERNAL)
            await _abort_as_bug(context, error)

    return checked


def _call(
    serve: Callable[..., Awaitable[Any]], count: Callable[[grpc.StatusCode], None]
) -> Callable[..., Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        try:
            return await serve(request, context)
        except RequestError as error:
            count(STATUS_OF[type(error)])
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            count(grpc.StatusCode.INTERNAL)
            await _abort_as_bug(context, error)

    return checked


async def _abort(context: Any, error: RequestError) -> None:
    code = STATUS_OF[type(error)]
    metadata: Any = ()
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=code.value[0], message=str(error), details=[detail])
        metadata = rpc_status.to_status(status).trailing_metadata
    await context.abort(code, str(error), metadata)


async def _abort_as_bug(context: Any, error: Exception) -> None:
    log.error("a call failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"our bug: {type(error).__name__}; the scheduler's log says more")
