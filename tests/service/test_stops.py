"""What ends an output, and what of it leaves: stop texts, characters of several ids, stop tokens, end of sequence."""

import asyncio
import itertools
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from scheduler.tokenizer import Tokenizer
from tests.service.calls import Stub
from tests.stack import collect
from tests.timed import EOS_TOKEN_ID, timed_request, timed_text, timed_tokens

SEED, NUM_TOKENS = 5000, 300


@pytest.fixture(scope="module")
def tokenizer(timed_model: Path) -> Tokenizer:
    return Tokenizer.load(timed_model)


async def test_every_delta_is_whole_characters_of_the_final_text(stub: Stub, tokenizer: Tokenizer) -> None:
    num_tokens = 600
    expected = timed_tokens(SEED, num_tokens)
    pieces = [tokenizer.piece(token_id) for token_id in expected]
    final = tokenizer.decode(expected)
    split = [a + b for a, b in itertools.pairwise(pieces) if isinstance(a, bytes) and isinstance(b, bytes)]
    assert any(is_character(pair) for pair in split), "no character lies across two ids"
    text = ""
    async for response in stub.Generate(timed_request(SEED, num_tokens)):
        text += response.delta.text
        assert final.startswith(text)
    assert text == final


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def stops_in(tokenizer: Tokenizer, text: str) -> list[tuple[str, ...]]:
    """Stop texts of one to many characters that lie in the text, or only seem to."""
    middle = len(text) // 2
    return [
        (text[middle],),
        (text[middle : middle + 2],),
        (text[middle : middle + 11],),
        (text[middle : middle + 60],),
        (text[middle : middle + 20] + "no", text[middle + 30 : middle + 33]),
        (text[-7:],),
        (text[-7:] + "more",),
        (text[:1],),
        ("never", "said"),
    ]


@pytest.mark.parametrize("case", range(9))
async def test_stop_texts(stub: Stub, tokenizer: Tokenizer, case: int) -> None:
    expected = timed_tokens(SEED, NUM_TOKENS)
    whole = tokenizer.decode(expected)
    stops = stops_in(tokenizer, whole)[case]
    ends = {stop: whole.find(stop) for stop in stops if stop in whole}
    request = timed_request(SEED, NUM_TOKENS)
    request.sampling.stop.extend(stops)
    token_ids: list[int] = []
    text = ""
    last = pb.Delta()
    async for response in stub.Generate(request):
        last = response.delta
        token_ids += last.token_ids
        text += last.text
        assert whole.startswith(text), "text left that a stop text, or half of a character, took back"
    assert token_ids == expected[: len(token_ids)]
    assert last.usage.num_output_tokens == len(token_ids)
    if not ends:
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert (len(token_ids), text) == (NUM_TOKENS, whole)
        return
    assert last.finish_reason == pb.FINISH_REASON_STOP
    stop = min(ends, key=lambda stop: ends[stop] + len(stop))
    assert text == whole[: ends[stop]]
    # The last id is the one that completed the stop text.
    assert len(tokenizer.decode(token_ids)) >= ends[stop] + len(stop)
    assert len(tokenizer.decode(token_ids[:-1]).rstrip("\ufffd")) < ends[stop] + len(stop)


async def test_stop_token_ids(client: PagodaClient, timed_model: Path) -> None:
    expected = timed_tokens(SEED, NUM_TOKENS)
    for index in (0, 1, 16, 100):
        stop_id = expected[index]
        first = expected.index(stop_id)
        request = timed_request(SEED, NUM_TOKENS)
        request.sampling.stop_token_ids.extend([429, stop_id])
        if 429 in expected[: first + 1]:
            first = expected.index(429)
        token_ids, text, last = await collect(client, request)
        assert token_ids == expected[: first + 1]
        assert text == timed_text(timed_model, expected[:first])
        assert last.finish_reason == pb.FINISH_REASON_STOP


async def test_end_of_sequence(client: PagodaClient) -> None:
    seed = next(s for s in range(6000, 7000) if EOS_TOKEN_ID in timed_tokens(s, 100)[20:])
    expected = timed_tokens(seed, NUM_TOKENS)
    request = timed_request(seed, NUM_TOKENS)
    assert (await collect(client, request))[0] == expected
    request.sampling.ignore_eos = False
    token_ids, _, last = await collect(client, request)
    assert token_ids == expected[: expected.index(EOS_TOKEN_ID) + 1]
    assert last.finish_reason == pb.FINISH_REASON_STOP


async def test_the_last_token_allowed_may_be_a_stop(client: PagodaClient) -> None:
    expected = timed_tokens(SEED, 20)
    request = timed_request(SEED, 20)
    assert expected.index(expected[19]) == 19
    request.sampling.stop_token_ids.append(expected[19])
    _, _, last = await collect(client, request)
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.num_output_tokens == 20


async def test_many_stop_texts_at_once(client: PagodaClient, timed_model: Path) -> None:
    async def one(seed: int) -> None:
        expected = timed_tokens(seed, 60)
        whole = timed_text(timed_model, expected)
        stop = whole[30:33]
        request = timed_request(seed, 60)
        request.sampling.stop.append(stop)
        assert (await collect(client, request))[1] == whole[: whole.find(stop)]

    await asyncio.gather(*(one(seed) for seed in range(7000, 7060)))
