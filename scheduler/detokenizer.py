"""Token ids to text while they arrive: whole characters only, nothing of a stop text, each id with its text.

Owns the text of one choice. What leaves, and where a piece may end, depends on the ids alone and never on
how they were grouped: a stream that is replayed from the log goes on exactly where another one stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Ids and their whole text."""

    token_ids: tuple[int, ...]
    text: str


class TextStream:
    """The text of one choice, id by id.

    The text is what the ids add to a text before them: a leading space stays. `first` is the index of the
    first id that is wanted; the ids before it are replayed for their effect and leave no trace in the pieces.
    An id leaves once its text can no longer change: the bytes of a character that is not whole, and what may
    become a stop text, wait (at most three bytes, at most one stop text).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), first: int = 0) -> None:
        self._piece_of = tokenizer.piece
        self._each_byte = tokenizer.replaces_each_byte
        self._stops = [_Stop(text) for text in stop]
        self._first = first
        self._pending = b""  # the start of a character
        # Offsets count characters from the choice's beginning. Chunks and ids are what has not been taken.
        self._length = 0
        self._taken_length = 0
        self._chunks: list[str] = []
        self._num_taken = 0
        self._token_ids: list[int] = []
        self._ends: list[int] = []  # where each id's text ends; the character it only begins is counted in
        self._num_ready = 0
        self._text_end: int | None = None  # where the stop text begins
        self._before_last = (0, b"")  # length and pending bytes before the last id

    @property
    def stopped(self) -> bool:
        """Whether a stop text is complete; later ids are ignored."""
        return self._text_end is not None

    @property
    def num_tokens_at_stop(self) -> int:
        """Ids up to and including the one that completed the stop text."""
        assert self.stopped
        return self._num_taken + len(self._token_ids)

    def push(self, token_ids: Sequence[int]) -> None:
        """Appends ids; those after the end of a stop text are ignored."""
        for token_id in token_ids:
            if self._text_end is not None:
                return
            self._before_last = (self._length, self._pending)
            piece = self._piece_of(token_id)
            if self._pending or isinstance(piece, bytes):
                piece = self._whole_characters(piece if isinstance(piece, bytes) else piece.encode())
            if piece:
                self._chunks.append(piece)
                self._length += len(piece)
            self._token_ids.append(token_id)
            self._ends.append(self._length + bool(self._pending))
            safe_length = self._match_stops(piece) if self._stops else self._length
            self._mark_ready(safe_length)

    def take(self) -> Piece:
        """What has become ready since the last take; may be empty."""
        if not self._num_ready:
            return Piece((), "")
        return self._release(self._num_ready, self._ends[self._num_ready - 1])

    def finish(self, drop_last_text: bool = False) -> Piece:
        """All that is left; a character that is not whole shows as U+FFFD.

        `drop_last_text`: the last id pushed is a stop token, it goes out without its text (take nothing
        between its push and this), and a stop text that it would have completed does not count.
        """
        if not self._token_ids:
            return Piece((), "")
        end = self._length
        if drop_last_text:
            end, self._pending = self._before_last
        elif self._text_end is not None:
            end, self._pending = self._text_end, b""
        if self._pending:
            text = "".join(self._chunks)[: end - self._taken_length] + self._replace(self._pending)
            self._chunks, end = [text], self._taken_length + len(text)
        self._pending = b""
        return self._release(len(self._token_ids), end)

    def _whole_characters(self, data: bytes) -> str:
        """The characters that these bytes decide; the start of one that may become whole is kept."""
        data = self._pending + data
        self._pending = b""
        text = ""
        while data:
            try:
                return text + data.decode()
            except UnicodeDecodeError as error:
                text += data[: error.start].decode()
                if error.reason == "unexpected end of data":
                    self._pending = data[error.start :]
                    return text
                text += self._replace(data[error.start : error.end])
                data = data[error.end :]
        return text

    def _replace(self, broken: bytes) -> str:
        return REPLACEMENT * (len(broken) if self._each_byte else 1)

    def _match_stops(self, text: str) -> int:
        """Runs the stops over new text; returns how much of all text can't become part of a stop."""
        if any(stop.num_matched for stop in self._stops) or any(stop.text[0] in text for stop in self._stops):
            start = self._length - len(text)
            for offset, char in enumerate(text, start + 1):
                complete = [len(stop.text) for stop in self._stops if stop.feed(char)]
                if complete:  # the stop that ends first counts, and of several that end here the longest
                    self._text_end = offset - max(complete)
                    return self._text_end
        return self._length - max(stop.num_matched for stop in self._stops)

    def _mark_ready(self, safe_length: int) -> None:
        ends, num_ready = self._ends, self._num_ready
        while num_ready < len(ends) and ends[num_ready] <= safe_length:
            num_ready += 1
        self._num_ready = num_ready

    def _release(self, num_tokens: int, end: int) -> Piece:
        """The next `num_tokens` ids and the text up to the offset `end`, less what is before `first`."""
        token_ids, text = self._token_ids[:num_tokens], "".join(self._chunks)
        cut = end - self._taken_length
        num_skipped = min(max(self._first - self._num_taken, 0), num_tokens)
        skipped_length = min(self._ends[num_skipped - 1], end) - self._taken_length if num_skipped else 0
        self._chunks = [text[cut:]] if cut < len(text) else []
        self._taken_length = end
        self._num_taken += num_tokens
        self._num_ready -= min(num_tokens, self._num_ready)
        del self._token_ids[:num_tokens], self._ends[:num_tokens]
        return Piece(tuple(token_ids[num_skipped:]), text[skipped_length:cut])


class _Stop:
    """One stop text and how much of it the end of the text matches (Knuth, Morris and Pratt)."""

    __slots__ = ("_fall_back", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fall_back = [0] * len(text)  # after i + 1 matched characters: the next shorter match that ends there
        for i in range(1, len(text)):
            matched = self._fall_back[i - 1]
            while matched and text[matched] != text[i]:
                matched = self._fall_back[matched - 1]
            self._fall_back[i] = matched + (text[matched] == text[i])

    def feed(self, char: str) -> bool:
        """Takes the next character; True when it completes the stop."""
        matched = self.num_matched
        while matched and self.text[matched] != char:
            matched = self._fall_back[matched - 1]
        matched += self.text[matched] == char
        self.num_matched = matched
        return matched == len(self.text)
