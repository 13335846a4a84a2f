"""What only a model shows: masks, the model's own settings, logits that are not finite, and NaN where nothing is."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
from pagoda.v1 import generation_pb2 as pb
from safetensors.torch import load_file, save_file

from scheduler.client import PagodaClient
from scheduler.tokenizer import Tokenizer
from tests.chaos.reference import Reference
from tests.checkpoints import make_checkpoint
from tests.service.calls import Stub, failure
from tests.stack import Stack, collect, greedy, started

BROKEN_ID, OTHER_EOS_ID = 299, 250
PROMPT = [5, 77, 130, 9]
HELD_S = 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ends by either of two ids; the embedding of one id is NaN, as bad weights are, and it is never sampled."""
    folder = make_checkpoint("qwen3", tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, OTHER_EOS_ID], "do_sample": True, "temperature": 0.5, "top_k": 1})
    )
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in (("model.embed_tokens.weight", torch.nan), ("lm_head.weight", 0.0)):
            if name in tensors:
                tensors[name][BROKEN_ID] = value
                save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def own_stack(checkpoint: Path) -> Iterator[Stack]:
    flags = ("--num-blocks", "24", "--max-num-batched-tokens", "48", "--poison-freed-blocks")
    with started(Stack(checkpoint, 1, ("--overcommit", "8"), flags)) as stack:
        yield stack


@pytest.fixture
async def stack(own_stack: Stack) -> AsyncIterator[Stack]:
    yield own_stack
    await own_stack.idle()


async def test_the_models_own_settings_hold(client: PagodaClient, reference: Reference) -> None:
    assert list((await client.get_model()).eos_token_ids) == [1, OTHER_EOS_ID]
    # top_k 1 of generation_config.json makes it greedy whatever the seed.
    request = greedy(PROMPT, 20)
    request.sampling.ClearField("temperature")
    assert (await collect(client, request))[0] == reference(PROMPT, 20)


@pytest.mark.parametrize("end_id", [1, OTHER_EOS_ID])
async def test_each_id_of_the_list_ends_it(client: PagodaClient, reference: Reference, end_id: int) -> None:
    """The prompt whose greedy output has the id is looked for with the reference."""
    rng = random.Random(end_id)
    while True:
        prompt = [rng.randrange(3, 290) for _ in range(5)]
        expected = reference(prompt, 20)
        ends = [i for i, token_id in enumerate(expected) if token_id in (1, OTHER_EOS_ID)]
        if ends and expected[ends[0]] == end_id:
            break
    request = greedy(prompt, 20)
    assert (await collect(client, request))[0] == expected
    request.sampling.ignore_eos = False
    token_ids, _, last = await collect(client, request)
    assert token_ids == expected[: ends[0] + 1]
    assert last.finish_reason == pb.FINISH_REASON_STOP


async def test_no_end_before_min_tokens(client: PagodaClient, reference: Reference) -> None:
    expected = reference(PROMPT, 30)
    ends = [expected[2], expected[4], OTHER_EOS_ID]
    request = greedy(PROMPT, 30)
    request.sampling.ignore_eos = False
    request.sampling.stop_token_ids.extend(ends)
    assert (await collect(client, request))[0] == expected[:3]
    for min_tokens in (1, 3, 4, 20, 30):
        request.sampling.min_tokens = min_tokens
        token_ids, _, last = await collect(client, request)
        assert len(token_ids) >= min_tokens
        assert not set(token_ids[:min_tokens]) & {*ends, 1}
        if last.finish_reason == pb.FINISH_REASON_STOP:
            assert token_ids[-1] in {*ends, 1}
        assert token_ids[:2] == expected[:2]


async def test_chat_goes_through_the_template(client: PagodaClient, checkpoint: Path, reference: Reference) -> None:
    ids = Tokenizer.load(checkpoint).encode_chat([("user", "the fox")])
    request = greedy(ids, 10)
    assert (await collect(client, request))[0] == reference(ids, 10)
    request.chat.messages.append(pb.ChatMessage(role="user", content="the fox"))
    assert request.WhichOneof("prompt") == "chat"
    assert (await collect(client, request))[0] == reference(ids, 10)


async def test_logits_that_are_not_finite_end_that_request_alone(
    stub: Stub, client: PagodaClient, reference: Reference
) -> None:
    good = [asyncio.create_task(collect(client, greedy([*PROMPT, i], 40))) for i in range(6)]
    for length in (1, 16, 40):
        code, details = await failure(stub.Generate(greedy([BROKEN_ID] * length, 5, resumable=True)))
        assert code is grpc.StatusCode.INTERNAL
        assert details == "the model's logits are not finite"
    for i, task in enumerate(good):
        reference.check([*PROMPT, i], (await task)[0], 40)


async def test_no_nan_of_unwritten_memory_reaches_a_logit(
    stack: Stack, client: PagodaClient, reference: Reference
) -> None:
    """Freed and unwritten blocks hold NaN; requests of all kinds come, go, preempt each other and share prefixes."""
    rng = random.Random(5)
    prefixes = [[rng.randrange(3, 290) for _ in range(length)] for length in (0, 16, 70)]
    prompts = [prefix + [rng.randrange(3, 290) for _ in range(length)] for prefix in prefixes for length in (1, 15, 40)]
    for prompt in prompts:
        reference(prompt, 40)  # now, so that it takes no time from what follows
    before = (await stack.status()).workers[0]

    async def one(number: int) -> None:
        prompt = rng.choice(prompts)
        num_tokens = rng.choice((1, 40, 40))
        reading = asyncio.create_task(collect(client, greedy(prompt, num_tokens)))
        if number % 4 == 0:
            await asyncio.sleep(HELD_S + 0.2 * rng.random())
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        else:
            reference.check(prompt, (await reading)[0], num_tokens)

    with stack.stopped("worker-0"):  # until all are there: a fast one would never run short of blocks
        all_of_them = asyncio.gather(*(one(number) for number in range(80)))
        await asyncio.sleep(HELD_S)
    await all_of_them
    after = (await stack.idle()).workers[0]
    assert after.num_preemptions > before.num_preemptions
    assert after.num_prefix_hit_tokens > before.num_prefix_hit_tokens
