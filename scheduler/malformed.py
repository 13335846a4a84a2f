"""Refuses bytes that are no message of the contract (invalid UTF-8, a broken field) as INVALID_ARGUMENT.

gRPC itself answers UNKNOWN, as if the service had failed.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """To be given to grpc.aio.server(interceptors=...); leaves calls that stream requests alone."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The same handler, which answers malformed requests itself."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        serve = getattr(handler, name)
        wrapped = _stream(serve) if inspect.isasyncgenfunction(serve) else _call(serve)
        deserialize = _tolerant(handler.request_deserializer)
        return handler._replace(request_deserializer=deserialize, **{name: wrapped})


@dataclass(frozen=True, slots=True)
class _Malformed:
    reason: str


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse


def _stream(serve: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def checked(request: Any, context: Any) -> AsyncIterator[Any]:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
        async for response in serve(request, context):
            yield response

    return checked


def _call(serve: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
        return await serve(request, context)

    return checked
