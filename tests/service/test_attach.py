"""Who may take up which stream where, and what becomes of a request whose client goes away."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from scheduler.detokenizer import TextStream
from scheduler.tokenizer import Tokenizer
from tests.service.calls import Stub, attach, begun, failure
from tests.stack import Stack, collect, started
from tests.timed import timed_request, timed_tokens

LONG = 4000


# -- the same request_id ----------------------------------------------------------------------------------------------


async def test_the_same_request_again_attaches(stub: Stub, client: PagodaClient) -> None:
    request = timed_request(1, 300, request_id="same", resumable=True)
    first = asyncio.create_task(collect(client, request))
    await begun(stub.Generate(request), 20)
    during, original, after = await collect(client, request), await first, await collect(client, request)
    assert during[0] == original[0] == after[0] == timed_tokens(1, 300)
    assert during[1] == original[1] == after[1]
    assert during[2].usage == original[2].usage == after[2].usage


async def test_the_same_request_many_times_at_once_runs_once(stack: Stack, client: PagodaClient) -> None:
    before = (await stack.status()).workers[0].num_output_tokens
    request = timed_request(2, 20, request_id="at-once", resumable=True)
    results = await asyncio.gather(*(collect(client, request) for _ in range(20)))
    assert all(token_ids == timed_tokens(2, 20) for token_ids, _, _ in results)
    assert (await stack.idle()).workers[0].num_output_tokens - before == 20


async def test_another_body_is_refused_while_it_runs_and_after(stub: Stub, client: PagodaClient) -> None:
    request = timed_request(3, 200, request_id="taken", resumable=True)
    other = timed_request(3, 201, request_id="taken", resumable=True)
    call = stub.Generate(request)
    await begun(call)
    for _ in range(2):
        code, details = await failure(stub.Generate(other))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert details.startswith("request_id: ")
        assert (await collect(client, request))[0] == timed_tokens(3, 200)
    call.cancel()


# -- attach -----------------------------------------------------------------------------------------------------------


async def test_attach_gives_exactly_the_rest_from_any_index(
    stub: Stub, client: PagodaClient, timed_model: Path
) -> None:
    """While it runs and after its end; characters of several ids and special tokens fall on the borders."""
    expected = timed_tokens(4, 120)
    tokenizer = Tokenizer.load(timed_model)
    request = timed_request(4, 120, request_id="rest", resumable=True)
    request.sampling.stop.append("never said")
    live = asyncio.create_task(collect(client, request))
    await begun(stub.Generate(request), 60)
    during = await asyncio.gather(*(attach(stub, "rest", i) for i in range(0, 60, 7)))
    whole_ids, whole_text, whole_last = await live
    assert whole_ids == expected
    after = await asyncio.gather(*(attach(stub, "rest", i) for i in range(121)))
    for index, (token_ids, text, last) in [*zip(range(0, 60, 7), during, strict=True), *enumerate(after)]:
        assert token_ids == expected[index:]
        assert text == text_from(tokenizer, expected, index)
        assert (last.finish_reason, last.usage) == (whole_last.finish_reason, whole_last.usage)
    assert after[0][1] == whole_text


def text_from(tokenizer: Tokenizer, token_ids: list[int], index: int) -> str:
    """The text that belongs to the ids from an index on."""
    stream = TextStream(tokenizer, ("never said",), first=index)
    stream.push(token_ids)
    return stream.take().text + stream.finish().text


async def test_a_text_put_together_from_many_streams_is_the_whole_text(stub: Stub, client: PagodaClient) -> None:
    whole = asyncio.create_task(collect(client, timed_request(5, 300, request_id="many", resumable=True)))
    await begun(stub.Generate(timed_request(5, 300, request_id="many", resumable=True)))
    index, text, num_streams, has_ended = 0, "", 0, False
    while not has_ended:
        num_streams += 1
        call, num_messages = stub.Attach(pb.AttachRequest(request_id="many", next_index=[index])), 0
        async for response in call:
            index += len(response.delta.token_ids)
            text += response.delta.text
            has_ended = has_ended or response.delta.finish_reason != pb.FINISH_REASON_UNSPECIFIED
            num_messages += 1
            if num_messages == 4:
                break
        call.cancel()
    assert num_streams > 5
    assert (index, text) == (300, (await whole)[1])


async def test_an_index_past_the_end_is_refused(stub: Stub, client: PagodaClient) -> None:
    await collect(client, timed_request(6, 10, request_id="past", resumable=True))
    assert (await attach(stub, "past", 10))[2].finish_reason == pb.FINISH_REASON_LENGTH
    for next_index, field in (([11], "next_index"), ([2**32 - 1], "next_index"), ([0, 0], "next_index")):
        code, details = await failure(stub.Attach(pb.AttachRequest(request_id="past", next_index=next_index)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(field)


@pytest.mark.parametrize("request_id", ["nobody", "", "no spaces", "x" * 1000, "*"])
async def test_an_unknown_request_is_not_found(stub: Stub, request_id: str) -> None:
    for call in (
        stub.Attach(pb.AttachRequest(request_id=request_id)),
        stub.Cancel(pb.CancelRequest(request_id=request_id)),
    ):
        code, details = await failure(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert details.startswith("request_id: ")


# -- clients that go --------------------------------------------------------------------------------------------------


async def test_a_resumable_request_goes_on_without_its_client(stack: Stack, stub: Stub) -> None:
    call = stub.Generate(timed_request(7, 300, request_id="goes-on", resumable=True))
    await begun(call, 5)
    call.cancel()
    await stack.until(lambda s: s.num_streams == 0)
    token_ids, _, last = await attach(stub, "goes-on", 3)
    assert token_ids == timed_tokens(7, 300)[3:]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_resumable_request_waits_as_long_as_it_was_told(stack: Stack, stub: Stub) -> None:
    request = timed_request(8, LONG, request_id="waits", resumable=True, resume_wait_s=0.3)
    call = stub.Generate(request)
    await begun(call, 5)
    call.cancel()
    await stack.until(lambda s: s.num_streams == 0)
    assert (await stack.status()).num_live_requests == 1
    again = stub.Attach(pb.AttachRequest(request_id="waits"))
    await begun(again, 200)  # longer than the wait: a client is there
    again.cancel()
    await stack.idle()
    token_ids, _, last = await attach(stub, "waits", 0)
    assert last.finish_reason == pb.FINISH_REASON_ABORT
    assert last.usage.num_output_tokens == len(token_ids) < LONG
    assert token_ids == timed_tokens(8, LONG)[: len(token_ids)]


async def test_a_request_that_is_not_resumable_ends_with_its_client(stack: Stack, stub: Stub) -> None:
    call = stub.Generate(timed_request(9, LONG, request_id="ends"))
    await begun(call, 5)
    call.cancel()
    await stack.idle()
    assert (await attach(stub, "ends", 0))[2].finish_reason == pb.FINISH_REASON_ABORT


async def test_a_request_with_two_clients_ends_with_the_second(stack: Stack, stub: Stub) -> None:
    calls = [stub.Generate(timed_request(10, LONG, request_id="second")) for _ in range(2)]
    for call in calls:
        await begun(call, 5)
    calls[0].cancel()
    await begun(calls[1], 100)
    calls[1].cancel()
    await stack.idle()


async def test_cancel(stack: Stack, stub: Stub, client: PagodaClient) -> None:
    reading = asyncio.create_task(collect(client, timed_request(11, LONG, request_id="cancel", resumable=True)))
    await stack.until(lambda s: s.workers[0].num_running == 1)
    assert await client.cancel("cancel")
    token_ids, _, last = await reading
    assert last.finish_reason == pb.FINISH_REASON_ABORT
    assert token_ids == timed_tokens(11, LONG)[: len(token_ids)]
    await stack.idle()
    assert not await client.cancel("cancel")
    assert (await attach(stub, "cancel", 0))[0] == token_ids


async def test_a_deadline_ends_the_request(stack: Stack, stub: Stub) -> None:
    for request_id, resumable in (("deadline", False), ("deadline-resumable", True)):
        request = timed_request(12, LONG, request_id=request_id, resumable=resumable, resume_wait_s=0.1 * resumable)
        code, _ = await failure(stub.Generate(request, timeout=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await stack.idle()
        token_ids, _, last = await attach(stub, request_id, 0)
        assert last.finish_reason == pb.FINISH_REASON_ABORT
        assert 0 < len(token_ids) < LONG


async def test_a_deadline_that_is_over_before_anything_began(stack: Stack, stub: Stub) -> None:
    code, _ = await failure(stub.Generate(timed_request(13, LONG), timeout=0.000001))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await stack.idle()


# -- records that expire ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forgetful(timed_model: Path) -> Iterator[Stack]:
    flags = ("--timed-step-s", "0.002", "--num-blocks", "500")
    with started(Stack(timed_model, scheduler_flags=("--record-ttl-s", "1"), worker_flags=flags)) as stack:
        yield stack


async def test_a_record_expires(forgetful: Stack) -> None:
    async with grpc.aio.insecure_channel(forgetful.address) as channel, forgetful.client() as client:
        stub = Stub(channel)
        await collect(client, timed_request(14, 10, request_id="expires", resumable=True))
        assert (await attach(stub, "expires", 4))[0] == timed_tokens(14, 10)[4:]
        with forgetful.redis() as redis:
            while redis.exists("{r:expires}"):  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.05)
        code, _ = await failure(stub.Attach(pb.AttachRequest(request_id="expires")))
        assert code is grpc.StatusCode.NOT_FOUND
        # The id is free again, for any body.
        assert (await collect(client, timed_request(15, 5, request_id="expires")))[0] == timed_tokens(15, 5)
        await forgetful.idle()
