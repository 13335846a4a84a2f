"""Bare calls of the contract, and how they end."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

Stub = generation_pb2_grpc.GenerationStub


async def attach(stub: Stub, request_id: str, next_index: int) -> tuple[list[int], str, pb.Delta]:
    """As `collect`, from an index on; checks that the stream begins there."""
    token_ids: list[int] = []
    text = ""
    last = pb.Delta()
    async for response in stub.Attach(pb.AttachRequest(request_id=request_id, next_index=[next_index])):
        assert response.request_id == request_id
        if response.HasField("delta"):
            last = response.delta
            assert last.index == next_index + len(token_ids)
            token_ids += last.token_ids
            text += last.text
    return token_ids, text, last


async def failure(call: object) -> tuple[grpc.StatusCode, str]:
    """How a call or a stream fails; what it says is one line."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), str(error.details())
    else:
        raise AssertionError("it did not fail")
    assert "\n" not in details
    return code, details


async def begun(call: AsyncIterator[pb.GenerateResponse], num_tokens: int = 1) -> None:
    """Reads a stream until that many tokens have come."""
    async for response in call:
        if response.delta.index + len(response.delta.token_ids) >= num_tokens:
            return
    raise AssertionError("the stream ended before")
