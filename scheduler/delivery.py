"""From logged tokens to a client's stream: text, boundaries, pace. Reads live requests, changes none.

A stream holds nothing but its place: what a slow client has not read stays in the sequence's one list of tokens.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from time import perf_counter

from pagoda.v1 import generation_pb2 as pb

from scheduler.detokenizer import Piece, TextStream
from scheduler.errors import InternalError, InvalidArgumentError, RequestError, UnavailableError
from scheduler.live_request import EndState, LiveRequest
from scheduler.sequence import FinishReason
from scheduler.tokenizer import Tokenizer

TURNS_PER_PASS = 4
"""Streams that get the processor between two looks of the event loop at everything else."""
PASS_INTERVAL_S = 0.0008
"""Between passes: 5,000 messages a second take about half a core, and leave the other half to the engines."""

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
        self._num_turns = 0
        self._is_armed = False

    async def turn(self) -> None:
        """Returns when it is the caller's turn."""
        if self._num_turns >= TURNS_PER_PASS or self._waiting:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            self._arm()
            await waiter
        self._num_turns += 1
        self._arm()

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            asyncio.get_running_loop().call_later(PASS_INTERVAL_S, self._next_pass)

    def _next_pass(self) -> None:
        self._is_armed = False
        self._num_turns = 0
        for _ in range(min(TURNS_PER_PASS, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._arm()


def num_ready_tokens(live: LiveRequest) -> int:
    """Logged tokens that may be delivered: an end token waits for the recorded end, for its text never leaves."""
    sequence = live.sequence
    num_logged = sequence.num_logged_tokens
    if live.end is None and num_logged:
        last_token_id = sequence.token_ids[sequence.num_prompt_tokens + num_logged - 1]
        return num_logged - (last_token_id in sequence.limits.end_token_ids)
    return num_logged


class Delivery:
    """Makes the deltas of every stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.gate = DeliveryGate()

    async def deltas(self, live: LiveRequest, next_index: int, stream_interval: int) -> AsyncIterator[pb.Delta]:
        """Choice 0's deltas from output index `next_index` on, to the end; `stream_interval` as in the contract.

        Raises InvalidArgumentError for an index past what is logged, the request's own error where it failed, and
        UnavailableError where another scheduler has it now.
        """
        if next_index > live.sequence.num_logged_tokens:
            raise InvalidArgumentError(
                "next_index", f"{next_index} is past the {live.sequence.num_logged_tokens} tokens"
            )
        text = TextStream(self._tokenizer, live.body.sampling.stop, first=next_index)
        num_pushed, index, num_interruptions = 0, next_index, live.num_interruptions
        while True:
            await self.gate.turn()
            started = perf_counter()
            sequence, end = live.sequence, live.end
            is_interrupted = live.is_orphaned or live.num_interruptions != num_interruptions
            if is_interrupted and end is None:
                raise UnavailableError("the request can't be served from here now; resume it")
            num_ready = num_ready_tokens(live)
            first = sequence.num_prompt_tokens
            text.push(sequence.token_ids[first + num_pushed : first + num_ready])
            num_pushed = num_ready
            if end is not None:
                yield self._last(live, end, text, index)
                return
            piece = text.take()
            if piece.token_ids:
                delta = pb.Delta(index=index, token_ids=piece.token_ids, text=piece.text)
                index += len(piece.token_ids)
                self.gate.busy_s += perf_counter() - started
                yield delta
            num_due = num_pushed + (max(1, stream_interval) if index > next_index else 1)
            while not (
                num_ready_tokens(live) >= num_due
                or live.end is not None
                or live.is_orphaned
                or live.num_interruptions != num_interruptions
            ):
                await live.changed()

    def _last(self, live: LiveRequest, end: EndState, text: TextStream, index: int) -> pb.Delta:
        if end.reason is FinishReason.ERROR:
            raise _ERRORS[end.status](end.error)
        sequence = live.sequence
        num_output = sequence.num_logged_tokens
        ends_by_id = end.reason is FinishReason.STOP and not text.stopped
        piece: Piece = text.finish(drop_last_text=ends_by_id)
        return pb.Delta(
            index=index,
            token_ids=piece.token_ids,
            text=piece.text,
            finish_reason=_REASONS[end.reason],
            usage=pb.Usage(
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=end.num_cached_tokens,
                num_output_tokens=num_output,
            ),
        )
