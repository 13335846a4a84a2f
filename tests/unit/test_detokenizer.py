"""The stream of text against the decode of the whole, whatever the ids, the stops and the grouping."""

import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from scheduler.detokenizer import Piece, TextStream
from scheduler.tokenizer import Tokenizer
from tests.unit import model_folders

TEXT = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="ab", max_size=20),
    st.text(alphabet="é日🤯👩\u200d👧\ufffdx", max_size=8),
)


@cache
def load(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.load(getattr(model_folders, kind)(Path(folder)))


def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of each single byte."""
    found = {}
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token_id)
        data = piece.encode() if isinstance(piece, str) else piece
        if len(data) == 1:
            found[data] = token_id
    return found


BYTE_IDS = byte_ids(load("byte_level"))


def ids_of(data: bytes) -> list[int]:
    return [BYTE_IDS[bytes([byte])] for byte in data]


@st.composite
def id_lists(draw: st.DrawFn) -> list[int]:
    """Texts as the tokenizer cuts them, texts byte by byte, broken bytes, special ids, ids that mean nothing."""
    tokenizer = load("byte_level")
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            ids += tokenizer.encode(draw(TEXT))[1:]
        elif kind == 1:
            ids += ids_of(draw(TEXT).encode())
        elif kind == 2:
            ids += ids_of(draw(st.binary(max_size=6)))
        elif kind == 3:
            ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=6))
        else:
            ids += ids_of(draw(TEXT).encode()[draw(st.integers(0, 3)) :])
    return ids


@st.composite
def stops_for(draw: st.DrawFn, text: str) -> list[str]:
    """Stops that the text has, that it almost has, and any others."""
    stops = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        stop = text[start : start + draw(st.integers(1, 5))] + draw(st.sampled_from(["", "", "a", "\ufffd"]))
        stops.append(stop or draw(st.text(min_size=1, max_size=3)))
    return stops


def groups(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cut = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cut], [*cut, len(ids)], strict=True)]


@cache
def beginnings() -> frozenset[bytes]:
    """Every proper prefix of every character's bytes (the last byte of a character takes 64 values)."""
    codes = (code for code in range(0x80, 0x110000, 0x40) if not 0xD800 <= code < 0xE000)
    return frozenset(char[:size] for char in (chr(code).encode() for code in codes) for size in range(1, len(char)))


def decided(ids: list[int]) -> str:
    """The specification: what of the bytes is certain, all but the beginning of a character at the end.

    (Python's own incremental decoder also holds back half a surrogate, ED A0, which can't become anything.)
    """
    tokenizer = load("byte_level")
    pieces = [tokenizer.piece(token_id) for token_id in ids]
    data = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    size = max(size for size in range(min(3, len(data)) + 1) if size == 0 or data[-size:] in beginnings())
    return data[: len(data) - size].decode(errors="replace")


def first_stop(ids: list[int], stops: list[str]) -> tuple[int, int, str] | None:
    """The specification: (offset of the end, ids that it took, stop) of the stop that is complete first."""
    text = decided(ids)
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end, next(n for n in range(len(ids) + 1) if len(decided(ids[:n])) >= end), stop


def run(stream: TextStream, grouped: list[list[int]]) -> list[Piece]:
    pieces = []
    for group in grouped:
        stream.push(group)
        pieces.append(stream.take())
    return pieces


def join(pieces: list[Piece]) -> Piece:
    return Piece(sum((p.token_ids for p in pieces), ()), "".join(p.text for p in pieces))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_ids_any_stops_any_grouping(data):
    ids = data.draw(id_lists())
    tokenizer = load("byte_level")
    whole = tokenizer.decode(ids)
    stops = data.draw(stops_for(whole))
    stream = TextStream(tokenizer, stops)
    pieces = run(stream, groups(data.draw, ids))
    before_end = join(pieces)
    stop = first_stop(ids, stops)
    assert stream.stopped == (stop is not None)
    pieces.append(stream.finish())
    if stop is None:
        assert join(pieces) == Piece(tuple(ids), whole)
        waiting = decided(ids)[len(before_end.text) :]
        # What waits is the beginning of a stop, up to the token that it began in, or less than a character.
        if not stops:
            assert len([i for i in ids[len(before_end.token_ids) :] if tokenizer.piece(i)]) <= 3
        assert len(waiting) < max(map(len, stops), default=1) + max((len(tokenizer.piece(i)) for i in ids), default=0)
    else:
        end, num_tokens, text = stop
        assert stream.num_tokens_at_stop == num_tokens
        assert join(pieces) == Piece(tuple(ids[:num_tokens]), decided(ids)[: end - len(text)])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_replayed_stream_goes_on_exactly_where_the_first_one_was(data):
    ids = data.draw(id_lists())
    tokenizer = load("byte_level")
    stops = data.draw(stops_for(tokenizer.decode(ids)))
    uninterrupted = TextStream(tokenizer, stops)
    one_by_one = run(uninterrupted, [[token_id] for token_id in ids])
    whole = join([*one_by_one, uninterrupted.finish()])
    broken_after = data.draw(st.integers(0, len(ids)))
    received = join(one_by_one[:broken_after])
    again = TextStream(tokenizer, stops, first=len(received.token_ids))
    rest = run(again, groups(data.draw, ids))
    assert join([received, *rest, again.finish()]) == whole
    # Pieces end at the same places, whatever the grouping.
    regrouped = TextStream(tokenizer, stops)
    ends = {len(join(one_by_one[: n + 1]).token_ids): join(one_by_one[: n + 1]).text for n in range(len(ids))}
    so_far = Piece((), "")
    for piece in run(regrouped, groups(data.draw, ids)):
        so_far = join([so_far, piece])
        assert not so_far.token_ids or ends[len(so_far.token_ids)] == so_far.text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stop_tokens_text_is_dropped_and_its_id_is_not(data):
    ids = data.draw(id_lists())
    assume(ids)
    tokenizer = load("byte_level")
    stops = data.draw(stops_for(tokenizer.decode(ids)))
    stop = first_stop(ids[:-1], stops)
    assume(stop is None)
    stream = TextStream(tokenizer, stops)
    pieces = run(stream, groups(data.draw, ids[:-1]))
    stream.push(ids[-1:])
    pieces.append(stream.finish(drop_last_text=True))
    assert join(pieces) == Piece(tuple(ids), tokenizer.decode(ids[:-1]))


@settings(max_examples=200, deadline=None)
@given(st.data())
@example(data=None)
def test_sentencepiece_bytes(data):
    tokenizer = load("byte_fallback")
    before = tokenizer.encode("a")
    if data is None:  # a word in the middle of a text keeps its space
        ids = tokenizer.encode("the")[1:]
    else:
        ids = tokenizer.encode(data.draw(TEXT))[1:] + data.draw(st.lists(st.integers(0, 280), max_size=5))
    whole = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    stream = TextStream(tokenizer)
    pieces = run(stream, [[token_id] for token_id in ids] if data is None else groups(data.draw, ids))
    joined = join([*pieces, stream.finish()])
    assert joined.token_ids == tuple(ids)
    # The library turns a whole run of bytes into U+FFFD where one is broken; a stream can't take back the others.
    if "\ufffd" not in whole:
        assert joined.text == whole


def text_stream(*stops: str, first: int = 0) -> TextStream:
    return TextStream(load("byte_level"), stops, first)


def test_a_character_leaves_when_it_is_whole_with_all_its_ids():
    stream = text_stream()
    ids = ids_of("🤯".encode())
    assert run(stream, [[i] for i in ids]) == [Piece((), "")] * 3 + [Piece(tuple(ids), "🤯")]


def test_broken_bytes_are_not_held_for_ever():
    stream = text_stream()
    ids = ids_of(b"\xe2" * 50)
    pieces = run(stream, [[i] for i in ids])
    assert join(pieces) == Piece(tuple(ids[:49]), "\ufffd" * 49)
    assert stream.finish() == Piece(tuple(ids[49:]), "\ufffd")


def test_half_a_surrogate_is_broken_at_once():
    stream = text_stream("\ufffd")
    stream.push(ids_of(b"\xed\xa0"))
    assert stream.stopped
    assert stream.num_tokens_at_stop == 2


def test_a_real_replacement_character_is_not_held():
    stream = text_stream()
    ids = ids_of("\ufffd".encode())
    assert join(run(stream, [ids])) == Piece(tuple(ids), "\ufffd")


def test_a_stop_over_several_tokens_never_shows():
    stream = text_stream("END")
    pieces = run(stream, [[i] for i in ids_of(b"xxENxEND and more")])
    assert join(pieces).text == "xxENx"
    assert stream.stopped
    assert stream.num_tokens_at_stop == len("xxENxEND")
    assert stream.finish() == Piece(tuple(ids_of(b"END")), "")


def test_ids_are_held_with_their_text():
    stream = text_stream("END")
    assert run(stream, [ids_of(b"a"), ids_of(b"E"), ids_of(b"N")]) == [
        Piece(tuple(ids_of(b"a")), "a"), Piece((), ""), Piece((), "")
    ]  # fmt: skip
    assert run(stream, [ids_of(b"x")]) == [Piece(tuple(ids_of(b"ENx")), "ENx")]


def test_of_overlapping_stops_the_one_that_is_complete_first_counts():
    stream = text_stream("abcd", "bc")
    stream.push(ids_of(b"abcd"))
    assert (stream.num_tokens_at_stop, stream.finish().text) == (3, "a")
    stream = text_stream("bc", "abc")  # of two that end together the longer one
    stream.push(ids_of(b"xabc"))
    assert stream.finish().text == "x"


def test_a_stop_that_repeats_itself():
    stream = text_stream("aab")
    stream.push(ids_of(b"aaaaab"))
    assert (stream.num_tokens_at_stop, stream.finish().text) == (6, "aaa")


def test_a_stop_that_begins_and_ends_inside_tokens():
    tokenizer = load("byte_level")
    ids = tokenizer.encode("lazy dog")[1:]
    assert tokenizer.piece(ids[0]) == "laz"
    stream = TextStream(tokenizer, ["azy d"])
    stream.push(ids)
    assert stream.finish() == Piece(tuple(ids[: stream.num_tokens_at_stop]), "l")


def test_the_end_flushes_a_part_of_a_stop_and_of_a_character():
    stream = text_stream("END")
    stream.push(ids_of(b"xEN"))
    assert stream.take().text == "x"
    assert stream.finish() == Piece(tuple(ids_of(b"EN")), "EN")
    stream = text_stream()
    stream.push(ids_of("é".encode()[:1]))
    assert stream.finish().text == "\ufffd"
    assert text_stream().finish() == Piece((), "")


@pytest.mark.parametrize("stops", [(), ("\n\n\n\n", "Observation:", "<|x|>")])
def test_the_cost_per_token_does_not_grow(stops):
    tokenizer = load("byte_level")
    ids = tokenizer.encode("def read_lines(path): return naïve café 日本\n" * 50)[1:]

    def seconds(num_rounds: int) -> float:
        stream = TextStream(tokenizer, stops)
        began = time.process_time()
        for _ in range(num_rounds):
            for token_id in ids:
                stream.push((token_id,))
                stream.take()
        return (time.process_time() - began) / num_rounds

    few, many = min(seconds(2) for _ in range(3)), min(seconds(40) for _ in range(2))
    assert many < 3 * few + 0.01


def test_a_long_replay_without_takes_is_linear():
    tokenizer = load("byte_level")
    ids = tokenizer.encode("def read_lines(path): return 1\n" * 4000)[1:]
    stream = TextStream(tokenizer, first=len(ids) - 1)
    began = time.process_time()
    stream.push(ids)
    assert stream.take().token_ids == tuple(ids[-1:])
    assert time.process_time() - began < 2
