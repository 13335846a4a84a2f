"""Requests while this scheduler owns them: body, choices, and who waits for their tokens."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from scheduler.beam_search import BeamSearch
from scheduler.best_of import WORDS_PER_TOKEN, rank, score
from scheduler.detokenizer import TextStream
from scheduler.request import RequestBody
from scheduler.sequence import FinishReason, Sequence

NOBODY_WAITS = 1 << 32
"""More tokens than any stream_interval."""


@dataclass(frozen=True, slots=True)
class EndState:
    """How a choice ended, as its request's record keeps it."""

    reason: FinishReason
    num_cached_tokens: int
    status: str = ""
    """With FinishReason.ERROR: the name of the gRPC status."""
    error: str = ""
    """With FinishReason.ERROR: one line that says why."""


def pack_ends(ends: Iterable[EndState]) -> bytes:
    """How all choices of a request ended: one line of JSON."""
    return json.dumps([[end.reason.value, end.num_cached_tokens, end.status, end.error] for end in ends]).encode()


def unpack_ends(data: bytes) -> list[EndState]:
    """The inverse of pack_ends."""
    return [EndState(FinishReason(reason), *rest) for reason, *rest in json.loads(data)]


@dataclass(frozen=True, slots=True)
class Ending:
    """An end that is decided and not recorded yet."""

    reason: FinishReason
    status: str = ""
    error: str = ""


@dataclass(slots=True, eq=False)
class LiveChoice:
    """One choice of a live request. A recovery gives it a new sequence; its streams stay."""

    request: "LiveRequest"
    sequence: Sequence
    stop_text: TextStream | None = None
    """Watches for stop texts, ahead of the log; None where the request has none."""
    ending: Ending | None = None
    """Decided by whoever; the engine that holds it carries it out."""
    is_logged: bool = False
    """Whether it has ended and its log is whole in Redis."""
    end: EndState | None = None
    """Set once the end is recorded, or sure to be found again in the log; the last thing that happens to it."""
    score: float | None = None
    """Of a hypothesis, and of a ranked choice once its request is over: what it was ranked by."""
    first_token_s: float = 0.0
    """When this scheduler saw its first token acknowledged, monotonic; 0: it did not."""
    last_token_s: float = 0.0


@dataclass(slots=True, eq=False)
class LiveRequest:
    """Mutable, and shared by the engine that runs it and the streams that read it."""

    body: RequestBody
    choices: list[LiveChoice] = field(default_factory=list)
    """All of them, from the moment that the request is made; their seq_ids follow each other. Of a beam search one per
    beam, of which the first `body.n` become the best hypotheses when it ends; with best_of so many."""
    search: BeamSearch | None = None
    candidates: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Of the beams that have reported them for the search's next step, by slot: (token id, log probability)."""
    is_accepted: bool = False
    """Whether Redis has acknowledged its row: it is durable."""
    is_orphaned: bool = False
    """Whether its worker was lost to another owner: its streams end with UNAVAILABLE."""
    num_interruptions: int = 0
    """How often all its streams were told to end with UNAVAILABLE, to be resumed."""
    stream_intervals: list[int] = field(default_factory=list)
    """Of each stream that reads it, the tokens from one delta to the next, 1 or more."""
    patience: int = NOBODY_WAITS
    """The least of them: for so many tokens whoever reads it waits in any case."""
    arrived_s: float = 0.0
    """When its client sent it to this scheduler, monotonic; 0: it was taken over."""
    arrived_at_s: float = 0.0
    """The same as Unix time."""
    abandon_timer: asyncio.TimerHandle | None = None
    _waiters: list["asyncio.Future[None]"] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended, for good."""
        return all(choice.end is not None for choice in self.choices)

    @property
    def is_ranked(self) -> bool:
        """Whether the best of its choices are delivered, which shows when all have ended."""
        return self.body.sampling.best_of > 0

    @property
    def num_streams(self) -> int:
        """Streams that read it."""
        return len(self.stream_intervals)

    def attach(self, stream_interval: int) -> None:
        """A stream reads it."""
        self.stream_intervals.append(stream_interval)
        self.patience = min(self.stream_intervals)

    def detach(self, stream_interval: int) -> None:
        """It reads it no longer."""
        self.stream_intervals.remove(stream_interval)
        self.patience = min(self.stream_intervals, default=NOBODY_WAITS)

    def delivered(self) -> list[LiveChoice]:
        """The choices that the client gets, in their order there. A ranked request must be over."""
        choices = self.choices
        if self.is_ranked:
            for choice in choices:
                choice.score = score(choice.sequence.logprobs or ())
            reasons = [choice.end.reason for choice in choices if choice.end is not None]
            choices = [choices[number] for number in rank([choice.score or 0.0 for choice in choices], reasons)]
        return choices[: self.body.n]

    @property
    def log_lengths(self) -> list[int]:
        """Entries of each choice's log: its tokens, or words. A search logs all of them in the first one's."""
        if self.search is not None:
            return [self.search.num_words, *[0] * (len(self.choices) - 1)]
        num_each = WORDS_PER_TOKEN if self.is_ranked else 1
        return [num_each * choice.sequence.num_output_tokens for choice in self.choices]

    def take_hypotheses(self) -> list[LiveChoice]:
        """The search is done: its best are the choices' outputs from now on; these choices."""
        assert self.search is not None
        ranked = list(zip(self.choices, self.search.hypotheses, strict=True))[: self.body.n]
        for choice, hypothesis in ranked:
            sequence = choice.sequence
            sequence.token_ids = [*sequence.token_ids[: sequence.num_prompt_tokens], *hypothesis.token_ids]
            choice.score = hypothesis.score
        return [choice for choice, _ in ranked]

    def begin_segments(self, first_indexes: list[int]) -> None:
        """Another worker logs each choice from its index on."""
        for choice, first_index in zip(self.choices, first_indexes, strict=True):
            choice.sequence.segment_first_index = first_index

    def notify(self) -> None:
        """Wakes every stream: tokens were logged, it was accepted, a choice has ended, or it is orphaned."""
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Waits for the next notify."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


class LiveRequests:
    """All live requests of this scheduler by request_id, and which of them still have a client.

    `abandon` is called for a request that nobody waits for any more.
    """

    def __init__(self, abandon: Callable[[LiveRequest], None]) -> None:
        self._abandon = abandon
        self._by_id: dict[str, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_streams(self) -> int:
        """Streams being served."""
        return sum(live.num_streams for live in self._by_id.values())

    def interrupt_streams(self) -> None:
        """Ends every stream with UNAVAILABLE; the requests live on."""
        for live in list(self._by_id.values()):
            live.num_interruptions += 1
            live.notify()

    def get(self, request_id: str) -> LiveRequest | None:
        """The request, or None where it is not live here."""
        return self._by_id.get(request_id)

    def add(self, live: LiveRequest) -> None:
        """A request that was accepted, or taken over without its client."""
        self._by_id[live.body.request_id] = live

    def discard(self, live: LiveRequest) -> None:
        """A request that ended, or is another owner's."""
        if self._by_id.get(live.body.request_id) is live:
            del self._by_id[live.body.request_id]
        if live.abandon_timer is not None:
            live.abandon_timer.cancel()

    def attach(self, live: LiveRequest, stream_interval: int) -> None:
        """A stream reads it."""
        live.attach(stream_interval)
        if live.abandon_timer is not None:
            live.abandon_timer.cancel()
            live.abandon_timer = None

    def detach(self, live: LiveRequest, stream_interval: int) -> None:
        """A stream is gone, for whatever reason."""
        live.detach(stream_interval)
        self.expect_client(live)

    def expect_client(self, live: LiveRequest) -> None:
        """Where nobody reads it: a resumable request waits for its client, another one is abandoned at once."""
        if live.is_over or live.is_orphaned:
            if live.num_streams == 0:
                self.discard(live)
        elif live.num_streams == 0 and live.body.resumable:
            loop = asyncio.get_running_loop()
            live.abandon_timer = loop.call_later(live.body.resume_wait_s, self._abandon, live)
        elif live.num_streams == 0:
            self._abandon(live)
