"""The happy path of every call, through real processes."""

import asyncio
import json
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.client import PagodaClient
from scheduler.tokenizer import Tokenizer
from tests.stack import Stack, collect
from tests.timed import EOS_TOKEN_ID, MAX_MODEL_LEN, VOCAB_SIZE, timed_request, timed_text, timed_tokens

CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Where is the fox?")])


async def test_token_ids(client: PagodaClient, timed_model: Path) -> None:
    token_ids, text, last = await collect(client, timed_request(1001, 50, prompt_tokens=37))
    assert token_ids == timed_tokens(1001, 50)
    assert text == timed_text(timed_model, token_ids)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage == pb.Usage(num_prompt_tokens=37, num_cached_tokens=0, num_output_tokens=50)


async def test_text_and_chat_are_tokenized_as_tokenize_says(
    client: PagodaClient, stub: generation_pb2_grpc.GenerationStub, timed_model: Path
) -> None:
    tokenizer = Tokenizer.load(timed_model)
    sampling = pb.SamplingParams(seed=7, max_tokens=3, ignore_eos=True)
    for field, value in (("text", "The quick brown fox"), ("chat", CHAT)):
        ids = list((await stub.Tokenize(pb.TokenizeRequest(**{field: value}))).token_ids)
        own = (
            tokenizer.encode(value)
            if isinstance(value, str)
            else tokenizer.encode_chat([("user", "Where is the fox?")])
        )
        assert ids == own
        _, _, last = await collect(client, pb.GenerateRequest(**{field: value}, sampling=sampling))
        assert last.usage.num_prompt_tokens == len(ids)


async def test_detokenize(stub: generation_pb2_grpc.GenerationStub) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text="naïve café"))).token_ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "naïve café"
    assert (await stub.Detokenize(pb.DetokenizeRequest())).text == ""


async def test_the_stream_begins_with_the_id_and_goes_on_index_by_index(
    stub: generation_pb2_grpc.GenerationStub,
) -> None:
    responses = [response async for response in stub.Generate(timed_request(1002, 30))]
    request_id = responses[0].request_id
    assert request_id
    assert not responses[0].HasField("delta")
    assert all(response.request_id == request_id for response in responses)
    index = 0
    for response in responses[1:]:
        assert response.delta.index == index
        assert response.delta.choice == 0
        index += len(response.delta.token_ids)
    assert index == 30
    assert [r.delta.finish_reason for r in responses[1:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(responses) - 2)
    assert not any(response.delta.HasField("usage") for response in responses[:-1])


async def test_a_stream_interval_gathers_tokens(client: PagodaClient) -> None:
    """The first token comes at once, then about so many together, then the rest; also where a stream is taken up."""
    request = timed_request(1003, 50)
    request.request_id, request.resumable, request.stream_interval = "gathered", True, 16
    deltas = [delta async for delta in client.generate(request)]
    sizes = [len(delta.token_ids) for delta in deltas]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == timed_tokens(1003, 50)
    assert sizes[0] < 16
    assert len(sizes) <= 1 + 50 // 16 + 1
    again = [delta async for delta in client.attach("gathered", [sizes[0]], stream_interval=16)]
    assert [token_id for delta in again for token_id in delta.token_ids] == timed_tokens(1003, 50)[sizes[0] :]


async def test_the_same_prompt_again_is_cached(client: PagodaClient) -> None:
    for tokens, cached in ((40, 32), (32, 16), (33, 32), (16, 0), (1, 0)):
        request = timed_request(1100 + tokens, 4, tokens)
        assert (await collect(client, request))[2].usage.num_cached_tokens == 0
        assert (await collect(client, request))[2].usage.num_cached_tokens == cached
        request.cache_salt = "mine"
        assert (await collect(client, request))[2].usage.num_cached_tokens == 0


async def test_a_seed_gives_the_same_ids_and_no_seed_others(client: PagodaClient) -> None:
    request = timed_request(1003, 20)
    assert (await collect(client, request))[0] == (await collect(client, request))[0]
    request.sampling.ClearField("seed")
    assert (await collect(client, request))[0] != (await collect(client, request))[0]


async def test_many_at_once(client: PagodaClient) -> None:
    seeds = range(1200, 1300)
    results = await asyncio.gather(*(collect(client, timed_request(s, 1 + s % 40, 1 + s % 70)) for s in seeds))
    for seed, (token_ids, _, _) in zip(seeds, results, strict=True):
        assert token_ids == timed_tokens(seed, 1 + seed % 40)


async def test_get_model(client: PagodaClient, timed_model: Path) -> None:
    model = await client.get_model()
    assert model.name == timed_model.name
    assert len(model.fingerprint) == 32
    assert (model.vocab_size, model.max_model_len, model.block_size) == (VOCAB_SIZE, MAX_MODEL_LEN, 16)
    assert list(model.eos_token_ids) == [EOS_TOKEN_ID]
    assert model.has_chat_template


async def test_get_status(stack: Stack, client: PagodaClient) -> None:
    before = (await client.get_status()).workers[0]
    await collect(client, timed_request(1400, 10, 40))
    await collect(client, timed_request(1400, 10, 40))
    await stack.idle()
    after = (await client.get_status()).workers[0]
    assert (after.name, after.state, after.device, after.num_blocks) == (
        "worker-0",
        pb.WORKER_STATE_LIVE,
        "timed",
        2000,
    )
    assert after.num_output_tokens - before.num_output_tokens == 20
    # 40 + 9 tokens, then what is not cached: 8 + 9. The last token of an output is never run.
    assert after.num_step_tokens - before.num_step_tokens == 49 + 17
    assert after.num_prefix_query_tokens - before.num_prefix_query_tokens == 80
    assert after.num_prefix_hit_tokens - before.num_prefix_hit_tokens == 32
    assert after.num_steps - before.num_steps == 20
    assert after.num_free_blocks + after.num_cached_blocks == 2000
    assert after.redis_round_trip_s > 0
    assert json.dumps(dict(after.phase_s))


def test_reflection_lists_and_describes_the_services(shared_stack: Stack) -> None:
    with grpc.insecure_channel(shared_stack.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert {"pagoda.v1.Generation", "pagoda.v1.WorkerLink", "grpc.health.v1.Health"} <= names
        service = DescriptorPool(database).FindServiceByName("pagoda.v1.Generation")
        assert "Generate" in service.methods_by_name
