"""From logged tokens to a client's stream: text, boundaries, pace. Reads live requests, changes none.

A stream holds nothing but its place: what a slow client has not read stays in the sequence's one list of tokens.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from time import monotonic, perf_counter

from pagoda.v1 import generation_pb2 as pb

from scheduler.detokenizer import Piece, TextStream
from scheduler.errors import InternalError, InvalidArgumentError, RequestError, UnavailableError
from scheduler.live_request import EndState, LiveChoice, LiveRequest
from scheduler.sequence import FinishReason
from scheduler.tokenizer import Tokenizer

TURN_INTERVAL_S = 0.0002
"""5,000 messages a second take about half a core, and leave the other half to the engines."""
PASS_INTERVAL_S = 0.0008
"""Between passes, if the event loop comes to it in time: it counts in milliseconds, and has engines to serve."""
MAX_TURNS_PER_PASS = 16
"""Streams that get the processor between two looks of the event loop at everything else, however late a pass is."""

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_ERRORS: dict[str, type[RequestError]] = {"INTERNAL": InternalError, "UNAVAILABLE": UnavailableError}


class DeliveryGate:
    """Keeps hundreds of streams that wake at once from holding up the engines: a few turns per pass, and a pause.

    While a stream waits for its turn its tokens add up, so that under load deltas grow instead of queues.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        """Processor time of all streams together."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_turns_left = self._turns_after(PASS_INTERVAL_S)
        self._last_pass_s = 0.0
        self._is_armed = False

    async def turn(self) -> None:
        """Returns when it is the caller's turn."""
        if not self._num_turns_left or self._waiting:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            self._arm()
            await waiter
        else:
            self._num_turns_left -= 1
            self._arm()

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._last_pass_s = monotonic()
            asyncio.get_running_loop().call_later(PASS_INTERVAL_S, self._next_pass)

    def _next_pass(self) -> None:
        """As many turns as are due by the time since the last pass: a pass that comes late makes up for it."""
        self._is_armed = False
        self._num_turns_left = self._turns_after(monotonic() - self._last_pass_s)
        while self._waiting and self._num_turns_left:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._num_turns_left -= 1
        if self._waiting:
            self._arm()

    @staticmethod
    def _turns_after(elapsed_s: float) -> int:
        return min(MAX_TURNS_PER_PASS, int(elapsed_s / TURN_INTERVAL_S))


def num_ready_tokens(choice: LiveChoice) -> int:
    """Logged tokens that may be delivered: an end token waits for the recorded end, for its text never leaves."""
    sequence = choice.sequence
    num_logged = sequence.num_logged_tokens
    if choice.end is None and num_logged:
        last_token_id = sequence.token_ids[sequence.num_prompt_tokens + num_logged - 1]
        return num_logged - (last_token_id in sequence.limits.end_token_ids)
    return num_logged


class _ChoiceStream:
    """One stream's place in one choice."""

    def __init__(self, number: int, choice: LiveChoice, text: TextStream, next_index: int, interval: int) -> None:
        self.is_done = False
        self._number = number
        self._choice = choice
        self._text = text
        self._index = next_index
        self._interval = max(1, interval)
        self._num_pushed = 0
        self._num_due = 1
        self._is_first = True

    @property
    def is_due(self) -> bool:
        """Whether there is enough for another delta, or the choice has ended."""
        choice = self._choice
        return not self.is_done and (choice.end is not None or num_ready_tokens(choice) >= self._num_due)

    def take(self) -> pb.Delta | None:
        """What is there; None where it is nothing, or all was taken. Raises the request's own error where it failed."""
        if self.is_done:
            return None
        choice, end = self._choice, self._choice.end
        sequence, num_ready = choice.sequence, num_ready_tokens(choice)
        first = sequence.num_prompt_tokens
        self._text.push(sequence.token_ids[first + self._num_pushed : first + num_ready])
        self._num_pushed = num_ready
        if end is not None:
            self.is_done = True
            return self._last(end)
        piece = self._text.take()
        if piece.token_ids:
            self._is_first = False
        self._num_due = num_ready + (1 if self._is_first else self._interval)
        if not piece.token_ids:
            return None
        delta = pb.Delta(choice=self._number, index=self._index, token_ids=piece.token_ids, text=piece.text)
        self._index += len(piece.token_ids)
        return delta

    def _last(self, end: EndState) -> pb.Delta:
        if end.reason is FinishReason.ERROR:
            raise _ERRORS[end.status](end.error)
        sequence = self._choice.sequence
        ends_by_id = end.reason is FinishReason.STOP and not self._text.stopped
        piece: Piece = self._text.finish(drop_last_text=ends_by_id)
        return pb.Delta(
            choice=self._number,
            index=self._index,
            token_ids=piece.token_ids,
            text=piece.text,
            finish_reason=_REASONS[end.reason],
            usage=pb.Usage(
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=end.num_cached_tokens,
                num_output_tokens=sequence.num_logged_tokens,
            ),
            score=self._choice.score,
        )


class Delivery:
    """Makes the deltas of every stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.gate = DeliveryGate()

    async def deltas(
        self, live: LiveRequest, next_indexes: Sequence[int], stream_interval: int
    ) -> AsyncIterator[pb.Delta]:
        """Deltas of all choices, each from its output index on (0 where none is given), to the end of the request.

        `stream_interval` as in the contract. Raises InvalidArgumentError for an index past the end, the request's own
        error where it failed, and UnavailableError where another scheduler has it now, or it is not that far yet.
        """
        firsts = _first_indexes(live, next_indexes)
        num_interruptions = live.num_interruptions
        while live.is_ranked and not live.is_over:
            _check_served(live, num_interruptions)
            await live.changed()
        streams = self._streams(live, firsts, stream_interval)
        while True:
            await self.gate.turn()
            _check_served(live, num_interruptions)
            for stream in streams:
                started = perf_counter()
                delta = stream.take()
                self.gate.busy_s += perf_counter() - started
                if delta is not None:
                    yield delta
            if all(stream.is_done for stream in streams):
                return
            while not (
                any(stream.is_due for stream in streams)
                or live.is_orphaned
                or live.num_interruptions != num_interruptions
            ):
                await live.changed()

    def _streams(self, live: LiveRequest, firsts: Sequence[int], stream_interval: int) -> list[_ChoiceStream]:
        streams = []
        for number, (choice, first) in enumerate(zip(live.delivered(), firsts, strict=True)):
            num_logged = choice.sequence.num_logged_tokens
            if first > num_logged and choice.end is None:
                # A Redis that came back behind has lost some that were delivered: they are generated again, the same.
                raise UnavailableError(f"token {first} is not there yet, of choice {number}; resume it in a moment")
            if first > num_logged:
                raise InvalidArgumentError("next_index", f"{first} is past the {num_logged} tokens")
            text = TextStream(self._tokenizer, live.body.sampling.stop, first=first)
            streams.append(_ChoiceStream(number, choice, text, first, stream_interval))
        return streams


def _first_indexes(live: LiveRequest, next_indexes: Sequence[int]) -> list[int]:
    """Of each choice that is delivered. Raises InvalidArgumentError where there are more."""
    num_choices = live.body.n
    if len(next_indexes) > num_choices:
        plural = "s" * (num_choices > 1)
        raise InvalidArgumentError("next_index", f"has {len(next_indexes)} entries for {num_choices} choice{plural}")
    return [*next_indexes, *[0] * (num_choices - len(next_indexes))]


def _check_served(live: LiveRequest, num_interruptions: int) -> None:
    """Raises UnavailableError where another scheduler has it now, or all streams were told to end."""
    if not live.is_over and (live.is_orphaned or live.num_interruptions != num_interruptions):
        raise UnavailableError("the request can't be served from here now; resume it")
