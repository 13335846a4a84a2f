"""Every way to ask wrongly, through real gRPC: the status, the field's name, and nothing else is touched."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.service.calls import Stub, attach, failure
from tests.stack import Stack, collect, started
from tests.timed import VOCAB_SIZE, timed_request, timed_tokens

POOL_TOKENS, MAX_MODEL_LEN = 320, 1000


@pytest.fixture(scope="module")
def small_stack(timed_model: Path) -> Iterator[Stack]:
    flags = ("--timed-step-s", "0.002", "--num-blocks", str(POOL_TOKENS // 16))
    with started(Stack(timed_model, 1, ("--max-model-len", str(MAX_MODEL_LEN)), flags)) as stack:
        yield stack


@pytest.fixture
async def stack(small_stack: Stack) -> AsyncIterator[Stack]:
    """After whatever was refused: nothing leaked, and the next request is served."""
    before = (await small_stack.idle()).workers[0]
    yield small_stack
    async with small_stack.client() as client:
        assert (await collect(client, timed_request(1, 3)))[0] == timed_tokens(1, 3)
    after = (await small_stack.idle()).workers[0]
    assert after.epoch == before.epoch


def request(**fields: Any) -> pb.GenerateRequest:
    names = [name for name in fields if name in pb.SamplingParams.DESCRIPTOR.fields_by_name]
    sampling = pb.SamplingParams(**{name: fields.pop(name) for name in names})
    prompt = {} if fields.keys() & {"text", "chat", "token_ids"} else {"text": "The quick brown fox"}
    return pb.GenerateRequest(sampling=sampling, **prompt, **fields)


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


BAD: dict[str, tuple[pb.GenerateRequest, str]] = {
    "nothing": (pb.GenerateRequest(), "prompt: "),
    "empty text": (request(text=""), "text: is empty"),
    "no ids": (request(token_ids=ids()), "token_ids.ids: is empty"),
    "no messages": (request(chat=pb.ChatMessages()), "chat: is empty"),
    "unknown role": (request(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="x", content="y")])), "chat: "),
    "id out of range": (request(token_ids=ids(0, VOCAB_SIZE)), "token_ids.ids[1]: "),
    "prompt longer than the pool": (request(token_ids=ids(*[5] * POOL_TOKENS)), "prompt: is 320 tokens long, a worker"),
    "prompt longer than the model": (request(token_ids=ids(*[5] * MAX_MODEL_LEN)), "prompt: is 1000 tokens long, max_"),
    "text longer than the model": (request(text="fox " * 9000), "prompt: is "),
    "max_tokens 0": (request(max_tokens=0), "sampling.max_tokens: "),
    "max_tokens negative": (request(max_tokens=-7), "sampling.max_tokens: "),
    "max_tokens beyond the room": (request(max_tokens=POOL_TOKENS), "sampling.max_tokens: "),
    "min_tokens over max_tokens": (request(max_tokens=2, min_tokens=3), "sampling.min_tokens: "),
    "temperature NaN": (request(temperature=math.nan), "sampling.temperature: "),
    "temperature negative": (request(temperature=-1), "sampling.temperature: "),
    "temperature infinite": (request(temperature=math.inf), "sampling.temperature: "),
    "top_p 2": (request(top_p=2), "sampling.top_p: "),
    "top_p 0": (request(top_p=0), "sampling.top_p: "),
    "min_p 1": (request(min_p=1), "sampling.min_p: "),
    "stop token out of range": (request(stop_token_ids=[VOCAB_SIZE]), "sampling.stop_token_ids[0]: "),
    "empty stop": (request(stop=[""]), "sampling.stop[0]: "),
    "request_id with a space": (request(request_id="a b"), "request_id: "),
    "request_id too long": (request(request_id="a" * 129), "request_id: "),
    "wait without resumable": (request(resume_wait_s=3), "resume_wait_s: "),
    "wait NaN": (request(resumable=True, resume_wait_s=math.nan), "resume_wait_s: "),
    "beams and temperature": (request(beam_width=2, temperature=0.5), "sampling.temperature: "),
    "one beam": (request(beam_width=1), "sampling.beam_width: "),
    "more choices than beams": (request(beam_width=2, n=3), "n: "),
    "best of fewer than n": (request(n=3, best_of=2), "sampling.best_of: must be 3, which is n, to 64, is 2"),
    "best of none": (request(best_of=0), "sampling.best_of: "),
    "best of too many": (request(n=2, best_of=65), "sampling.best_of: "),
    "best of beams": (request(beam_width=4, best_of=4), "sampling.best_of: does not go with beam_width"),
    "penalty without beams": (request(length_penalty=2), "sampling.length_penalty: "),
    "too many beams for the pool": (request(beam_width=64, max_tokens=200), "sampling."),
    "tenant too long": (request(tenant="t" * 257), "tenant: "),
    "cache_salt too long": (request(cache_salt="t" * 257), "cache_salt: "),
}
UNSERVED: dict[str, pb.GenerateRequest] = {
    "adapter": request(adapter="mine"),
    "sampling.presence_penalty": request(presence_penalty=0.1),
    "sampling.frequency_penalty": request(frequency_penalty=0.1),
    "sampling.repetition_penalty": request(repetition_penalty=1.1),
    "sampling.logprobs": request(logprobs=1),
    "sampling.json_schema": request(json_schema="{}"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_refused_by_the_name_of_its_field(stub: Stub, case: str) -> None:
    message, begins = BAD[case]
    code, details = await failure(stub.Generate(message))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(begins), details


@pytest.mark.parametrize("option", UNSERVED)
async def test_what_is_not_served_yet_is_refused_by_name(stub: Stub, option: str) -> None:
    code, details = await failure(stub.Generate(UNSERVED[option]))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details == f"{option} is not served yet; leave it unset"


async def test_the_smaller_calls_refuse_too(stub: Stub) -> None:
    for call, begins in (
        (stub.Tokenize(pb.TokenizeRequest()), "input: "),
        (stub.Tokenize(pb.TokenizeRequest(text="")), "text: "),
        (stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatMessages())), "chat: "),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, VOCAB_SIZE])), "token_ids[1]: "),
    ):
        code, details = await failure(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(begins), details


async def test_the_longest_request_that_fits_is_served(stub: Stub, client: PagodaClient) -> None:
    whole = timed_request(2, 1, POOL_TOKENS - 1, request_id="whole")
    assert (await collect(client, whole))[0] == timed_tokens(2, 1)
    half = timed_request(3, POOL_TOKENS // 2, POOL_TOKENS // 2)
    assert (await collect(client, half))[0] == timed_tokens(3, POOL_TOKENS // 2)
    unlimited = timed_request(4, 1, 20, request_id="unlimited")
    unlimited.sampling.ClearField("max_tokens")
    assert (await collect(client, unlimited))[0] == timed_tokens(4, POOL_TOKENS - 20)
    assert (await attach(stub, "unlimited", 0))[2].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    "data",
    [
        b"\x12\x03\xff\xfe\xfd",
        b"\x0a\x02\xc3\x28\x12\x01a",
        b"\x12\xff",
        b"\xff" * 100,
        b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    ],
    ids=["text", "request_id", "cut short", "noise", "long length"],
)
async def test_bytes_that_are_no_request(stack: Stack, data: bytes) -> None:
    """Invalid UTF-8 in a text, and what is no message at all."""
    async with grpc.aio.insecure_channel(stack.address) as channel:
        code, _ = await failure(channel.unary_stream("/pagoda.v1.Generation/Generate")(data))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        code, _ = await failure(channel.unary_unary("/pagoda.v1.Generation/Tokenize")(b"\x0a\x01\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        code, _ = await failure(channel.unary_unary("/pagoda.v1.Generation/Nothing")(b""))
        assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("num_bytes", [2 << 20, 10 << 20], ids=["2 MB", "10 MB"])
async def test_a_huge_prompt_is_refused_and_holds_nobody_up(stack: Stack, stub: Stub, num_bytes: int) -> None:
    async def longest_gap_s() -> float:
        last_s, gap_s = time.monotonic(), 0.0
        async for _ in stub.Generate(timed_request(5, 290)):
            now_s = time.monotonic()
            last_s, gap_s = now_s, max(gap_s, now_s - last_s)
        return gap_s

    huge = (request(text="fox " * (num_bytes // 4)), request(token_ids=ids(*[200] * (num_bytes // 2))))
    reading = asyncio.create_task(longest_gap_s())
    await stack.until(lambda s: s.workers[0].num_running == 1)
    options = [("grpc.max_send_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(stack.address, options=options) as channel:
        for code, details in await asyncio.gather(*(failure(Stub(channel).Generate(h)) for h in huge)):
            if num_bytes > 8 << 20:
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "message larger" in details
            else:
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert details.startswith("prompt: is ")
    assert await reading < 5.0  # this process packs and sends megabytes meanwhile
