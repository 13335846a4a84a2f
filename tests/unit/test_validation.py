"""Every way to ask wrongly is refused by the field's name, and nothing else is."""

import math
import re

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.errors import STATUS_OF, InvalidArgumentError, RequestError, UnsupportedError
from scheduler.malformed import RefuseMalformed
from scheduler.request import RequestBody
from scheduler.tokenizer import Tokenizer
from scheduler.validation import Limits, digest, encode_prompt, validate
from tests.unit import model_folders

LIMITS = Limits(max_model_len=100, max_pool_tokens=80, max_resume_wait_s=60, default_resume_wait_s=7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    generation = {"eos_token_id": 2, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    return Tokenizer.load(model_folders.byte_level(tmp_path_factory.mktemp("model"), generation_config=generation))


def request(num_prompt_tokens: int = 5, **fields) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(
        **{name: fields.pop(name) for name in list(fields) if name in pb.SamplingParams.DESCRIPTOR.fields_by_name}
    )
    prompt = (
        {} if fields.keys() & {"text", "chat", "token_ids"} else {"token_ids": pb.TokenIds(ids=[7] * num_prompt_tokens)}
    )
    return pb.GenerateRequest(sampling=sampling, **prompt, **fields)


def chat(*messages: tuple[str, str]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])


BAD = {
    "no prompt": (pb.GenerateRequest(), "prompt: set one of text, token_ids, chat"),
    "empty text": (request(text=""), "text: is empty"),
    "no ids": (request(0), "token_ids.ids: is empty"),
    "no messages": (request(chat=chat()), "chat: is empty"),
    "unknown role": (request(chat=chat(("robot", "beep"))), "chat: .*unknown role robot"),
    "id out of range": (
        request(token_ids=pb.TokenIds(ids=[1, 4000000000])),
        r"token_ids.ids\[1\]: 4000000000 is out of range",
    ),
    "prompt longer than the pool": (request(80), "prompt: is 80 tokens long, a worker's KV pool of 80 .* allows 79"),
    "prompt longer than the model": (request(100), "prompt: is 100 tokens long, max_model_len 100 allows 99"),
    "max_tokens 0": (request(max_tokens=0), "sampling.max_tokens: must be at least 1, is 0"),
    "max_tokens negative": (request(max_tokens=-(2**63)), "sampling.max_tokens: must be at least 1"),
    "max_tokens too large": (request(max_tokens=76), "sampling.max_tokens: is 76, .* 75"),
    "min_tokens negative": (request(min_tokens=-1), "sampling.min_tokens: must be at least 0"),
    "min over max": (request(max_tokens=3, min_tokens=4), "sampling.min_tokens: is 4, .* 3"),
    "min over the room": (request(min_tokens=76), "sampling.min_tokens: is 76, .* 75"),
    "temperature NaN": (request(temperature=math.nan), "sampling.temperature: must be 0 to 100, is nan"),
    "temperature infinite": (request(temperature=math.inf), "sampling.temperature: must be 0 to 100, is inf"),
    "temperature negative": (request(temperature=-0.1), "sampling.temperature: must be 0 to 100"),
    "temperature huge": (request(temperature=101), "sampling.temperature: must be 0 to 100"),
    "top_p 2": (request(top_p=2), "sampling.top_p: must be over 0 and up to 1, is 2"),
    "top_p 0": (request(top_p=0), "sampling.top_p: must be"),
    "top_p NaN": (request(top_p=math.nan), "sampling.top_p: must be"),
    "min_p 1": (request(min_p=1), "sampling.min_p: must be"),
    "min_p negative": (request(min_p=-1), "sampling.min_p: must be"),
    "min_p NaN": (request(min_p=math.nan), "sampling.min_p: must be"),
    "stop token out of range": (request(stop_token_ids=[5, 500]), r"sampling.stop_token_ids\[1\]: 500"),
    "many stop tokens": (request(stop_token_ids=[1] * 257), "sampling.stop_token_ids: has 257 ids"),
    "empty stop": (request(stop=["a", ""]), r"sampling.stop\[1\]: is empty"),
    "long stop": (request(stop=["a" * 257]), r"sampling.stop\[0\]: has 257 characters"),
    "many stops": (request(stop=["a"] * 17), "sampling.stop: has 17 texts"),
    "request_id with a space": (request(request_id="a b"), "request_id: must be"),
    "request_id with a newline": (request(request_id="ab\n"), "request_id: must be"),
    "request_id with braces": (request(request_id="{w:x}"), "request_id: must be"),
    "request_id too long": (request(request_id="a" * 129), "request_id: must be"),
    "tenant too long": (request(tenant="a" * 257), "tenant: has 257"),
    "cache_salt too long": (request(cache_salt="a" * 257), "cache_salt: has 257"),
    "resume_wait_s alone": (request(resume_wait_s=1), "resume_wait_s: is set, but resumable is not"),
    "resume_wait_s NaN": (request(resumable=True, resume_wait_s=math.nan), "resume_wait_s: must be 0 to 60"),
    "resume_wait_s negative": (request(resumable=True, resume_wait_s=-1), "resume_wait_s: must be 0 to 60"),
    "resume_wait_s too large": (request(resumable=True, resume_wait_s=61), "resume_wait_s: must be 0 to 60"),
    "too many choices": (request(n=65), "n: is 65, at most 64"),
    "one beam": (request(beam_width=1), "sampling.beam_width: must be 2 to 64, is 1"),
    "more choices than beams": (request(beam_width=2, n=4), "n: is 4, at most 2 beams"),
    "beams that sample": (request(beam_width=3, top_k=4), "sampling.top_k: does not go with beam_width"),
    "beams and stop texts": (request(beam_width=3, stop=["x"]), "sampling.stop: does not go with beam_width"),
    "length_penalty alone": (request(length_penalty=1), "sampling.length_penalty: is set, but beam_width is not"),
    "length_penalty NaN": (request(beam_width=3, length_penalty=math.nan), "sampling.length_penalty: must be -10 to"),
    "early_stopping alone": (request(early_stopping=1), "sampling.early_stopping: is set, but beam_width is not"),
    "early_stopping unknown": (request(beam_width=3, early_stopping=9), "sampling.early_stopping: 9 is not one"),
    "beams beyond the pool": (request(beam_width=8), "sampling.beam_width: 8 beams of this prompt need more than"),
}
UNSERVED = {
    "adapter": {"adapter": "mine"},
    "sampling.presence_penalty": {"presence_penalty": 0},
    "sampling.frequency_penalty": {"frequency_penalty": 0.5},
    "sampling.repetition_penalty": {"repetition_penalty": 1},
    "sampling.logprobs": {"logprobs": 0},
    "sampling.json_schema": {"json_schema": ""},
}


@pytest.mark.parametrize("case", BAD)
def test_refused_by_the_name_of_the_field(tokenizer, case):
    message, pattern = BAD[case]
    with pytest.raises(InvalidArgumentError) as caught:
        validate(message, tokenizer, LIMITS)
    assert re.match(pattern, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert STATUS_OF[type(caught.value)] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("option", UNSERVED)
def test_what_is_not_served_is_refused_by_name(tokenizer, option):
    with pytest.raises(UnsupportedError, match=re.escape(option)):
        validate(request(**UNSERVED[option]), tokenizer, LIMITS)


def test_what_is_unset_is_filled_in(tokenizer):
    body = validate(request(num_prompt_tokens=5), tokenizer, LIMITS)
    sampling = body.sampling
    assert body.prompt_token_ids == (7,) * 5
    assert (sampling.max_tokens, sampling.min_tokens, sampling.min_p) == (75, 0, 0)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == pytest.approx((0.6, 20, 0.9))
    assert (body.n, body.resumable, body.resume_wait_s) == (1, False, 0)
    assert re.fullmatch("[0-9a-f]{32}", body.request_id)
    again = validate(request(num_prompt_tokens=5), tokenizer, LIMITS)
    assert again.request_id != body.request_id
    assert again.sampling.seed != sampling.seed
    assert 0 <= sampling.seed < 2**64
    assert again.digest == body.digest
    assert len(body.digest) == 16
    assert RequestBody.from_bytes(body.to_bytes(), body.digest) == body


def test_what_is_set_stays(tokenizer):
    message = request(
        temperature=0, top_k=0, top_p=1, min_p=0.5, seed=2**64 - 1, max_tokens=75, min_tokens=75,
        ignore_eos=True, stop=["b", "a", "b"], stop_token_ids=[3, 1, 3], request_id="Az09._:-", n=1,
        resumable=True, tenant="t", cache_salt="s", priority=-3,
    )  # fmt: skip
    body = validate(message, tokenizer, LIMITS)
    assert (body.sampling.temperature, body.sampling.top_k, body.sampling.top_p) == (0, 0, 1)
    assert (body.sampling.seed, body.sampling.min_p) == (2**64 - 1, 0.5)
    assert (body.sampling.max_tokens, body.sampling.min_tokens, body.sampling.ignore_eos) == (75, 75, True)
    assert (body.sampling.stop, body.sampling.stop_token_ids) == (("b", "a"), (3, 1))
    assert (body.request_id, body.tenant, body.cache_salt, body.priority) == ("Az09._:-", "t", "s", -3)
    assert (body.resumable, body.resume_wait_s) == (True, 7)


def test_text_and_chat_are_tokenized(tokenizer):
    assert validate(request(text="hi"), tokenizer, LIMITS).prompt_token_ids == tuple(tokenizer.encode("hi"))
    ids = tuple(tokenizer.encode_chat([("user", "hi")]))
    assert validate(request(chat=chat(("user", "hi"))), tokenizer, LIMITS).prompt_token_ids == ids
    assert encode_prompt(pb.TokenizeRequest(text="hi"), tokenizer) == tokenizer.encode("hi")
    with pytest.raises(InvalidArgumentError, match="input: set one of"):
        encode_prompt(pb.TokenizeRequest(), tokenizer)


def test_the_longest_prompt_leaves_room_for_one_token(tokenizer):
    assert validate(request(79), tokenizer, LIMITS).sampling.max_tokens == 1
    roomy = Limits(max_model_len=100, max_pool_tokens=1000)
    assert validate(request(99), tokenizer, roomy).sampling.max_tokens == 1


def test_the_digest_tells_bodies_apart():
    first = request(request_id="r", seed=1, tenant="a")
    same = pb.GenerateRequest.FromString(first.SerializeToString())
    assert digest(first) == digest(same)
    assert digest(first) != digest(request(request_id="r", seed=2, tenant="a"))
    assert digest(first) != digest(request(request_id="r", seed=1, cache_salt="a"))


FLOATS = st.floats(width=32)
SAMPLING = st.builds(
    lambda fields: pb.SamplingParams(**{name: value for name, value in fields.items() if value is not None}),
    st.fixed_dictionaries(
        {
            "temperature": st.none() | FLOATS,
            "top_p": st.none() | FLOATS,
            "min_p": st.none() | FLOATS,
            "top_k": st.none() | st.integers(0, 2**32 - 1),
            "seed": st.none() | st.integers(0, 2**64 - 1),
            "max_tokens": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 90),
            "min_tokens": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 90),
            "stop": st.lists(st.text(max_size=3), max_size=3),
            "stop_token_ids": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), max_size=3),
        }
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    sampling=SAMPLING, wait_s=st.floats(), resumable=st.booleans(), prompt=st.lists(st.integers(0, 500), max_size=90)
)
def test_whatever_comes_is_refused_or_in_range(sampling, wait_s, resumable, prompt, tokenizer):
    message = pb.GenerateRequest(
        sampling=sampling, resume_wait_s=wait_s, resumable=resumable, token_ids=pb.TokenIds(ids=prompt)
    )
    try:
        body = validate(message, tokenizer, LIMITS)
    except RequestError as error:
        assert type(error) in STATUS_OF  # noqa: PT017
        return
    s = body.sampling
    assert 0 <= s.temperature <= 100
    assert 0 < s.top_p <= 1
    assert 0 <= s.min_p < 1
    assert 1 <= s.max_tokens <= 80 - len(prompt)
    assert 0 <= s.min_tokens <= s.max_tokens
    assert all(0 <= i < tokenizer.vocab_size for i in (*s.stop_token_ids, *body.prompt_token_ids))
    assert RequestBody.from_bytes(body.to_bytes(), body.digest) == body


class Echo(generation_pb2_grpc.GenerationServicer):
    async def Generate(self, request, context):  # noqa: N802
        yield pb.GenerateResponse(request_id=request.request_id)
        yield pb.GenerateResponse(request_id=request.request_id)

    async def Tokenize(self, request, context):  # noqa: N802
        return pb.TokenizeResponse(token_ids=[len(request.text)])


async def test_bytes_that_are_no_message_are_the_clients_fault():
    server = grpc.aio.server(interceptors=[RefuseMalformed()])
    generation_pb2_grpc.add_GenerationServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for bad in (b"\x12\x02\xff\xfe", b"\x0a\x02\xff\xfe", b"\xff\xff"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream("/pagoda.v1.Generation/Generate")(bad).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/pagoda.v1.Generation/Tokenize")(bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stub = generation_pb2_grpc.GenerationStub(channel)
        assert len([r async for r in stub.Generate(pb.GenerateRequest(request_id="r"))]) == 2
        assert (await stub.Tokenize(pb.TokenizeRequest(text="four"))).token_ids == [4]
    await server.stop(None)
