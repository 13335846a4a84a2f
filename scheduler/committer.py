"""What one engine has decided and Redis is to make true: numbered scripts, and what follows from their answers.

Owns the scripts in flight of one worker. A token is logged, a block reserved, a request accepted or ended only once the
script that says so is acknowledged; the moment it is, this tells whoever waits for it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.best_of import WORDS_PER_TOKEN, to_words
from scheduler.block_manager import BlockCopy
from scheduler.changes import Changes
from scheduler.live_request import EndState, LiveChoice, LiveRequest, pack_ends, unpack_ends
from scheduler.request_store import OwnershipLostError, RequestStore
from scheduler.sequence import FinishReason, Sequence
from scheduler.store import SequenceRow, WorkerStore
from scheduler.swapper import Swap

_SHOWN_BY_THE_LOG = (FinishReason.STOP, FinishReason.LENGTH)
"""Ends that whoever comes next finds in a log's tail."""
MAX_COMMITS_IN_FLIGHT = 64
"""Scripts without an answer beyond which no new step is planned: backpressure while Redis is away."""


@dataclass(slots=True)
class _Commit:
    """What is true once a script is acknowledged."""

    step_id: int = 0
    logged: list[tuple[LiveChoice, int]] = field(default_factory=list)
    reserved: list[tuple[Sequence, int, int]] = field(default_factory=list)
    accepted: list[tuple[LiveRequest, "asyncio.Future[None]"]] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    ended: list[LiveChoice] = field(default_factory=list)
    reply: "asyncio.Future[object] | None" = None


@dataclass(frozen=True, slots=True)
class CommitEvents:
    """Whom the answers concern."""

    progress: Callable[[], None]
    """There may be something to plan now."""
    ended: Callable[[LiveRequest], None]
    """The end of this request is recorded."""
    tokens: Callable[[list[tuple[LiveChoice, int, int]]], None]
    """(choice, tokens before, tokens now): these may be delivered."""
    lost: Callable[[str], None]
    """Redis refused: the worker is another owner's, or the mirror is not what Redis holds."""


class Committer:
    """Collects rows until `send`. `changes` is shared with the block manager, which writes its decisions into it."""

    def __init__(self, worker: str, store: WorkerStore, requests: RequestStore, events: CommitEvents) -> None:
        self.changes = Changes()
        self.has_lost_ownership = False
        self.committed_step_id = 0
        """Highest step whose result is in Redis."""
        self.num_commits = 0
        self.acked_copies: list[BlockCopy] = []
        """Copies that a plan may make; whoever plans takes them."""
        self.acked_swaps: list[Swap] = []
        """Swaps that a plan may begin, likewise."""
        self._worker = worker
        self._store = store
        self._requests = requests
        self._events = events
        self._next = _Commit()
        self._in_flight: deque[_Commit] = deque()
        self._recordings: set[asyncio.Task[None]] = set()

    @property
    def owner(self) -> tuple[str, int]:
        """(worker, epoch), as a request's record names its owner."""
        return self._worker, self._store.epoch

    @property
    def is_full(self) -> bool:
        """Whether Redis is too far behind to plan more."""
        return len(self._in_flight) >= MAX_COMMITS_IN_FLIGHT

    @property
    def num_in_flight(self) -> int:
        """Scripts that Redis has not answered."""
        return len(self._in_flight)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def log_tokens(self, choice: LiveChoice, first_index: int, token_ids: list[int]) -> None:
        """Appends output tokens, with what ranks them; the streams see them once they are acknowledged."""
        sequence = choice.sequence
        if sequence.logprobs is None:
            self._append(sequence, first_index, token_ids)
        else:
            words = to_words(token_ids, sequence.logprobs[first_index:])
            self._append(sequence, WORDS_PER_TOKEN * first_index, words)
        self._next.logged.append((choice, first_index + len(token_ids)))

    def log_search(self, live: LiveRequest, words: list[int]) -> None:
        """Appends a step of a beam search, which is in its state already, to the log of the first beam."""
        assert live.search is not None
        self._append(live.choices[0].sequence, live.search.num_words - len(words), words)

    def _append(self, sequence: Sequence, first_index: int, entries: list[int]) -> None:
        if sequence.segment_first_index:
            self.changes.segments[sequence.seq_id] = sequence.segment_first_index
        self.changes.append.append((sequence.seq_id, first_index - sequence.segment_first_index, entries))

    def deliver(self, choice: LiveChoice) -> None:
        """A hypothesis is whole: its tokens may be delivered once the log that it comes from is acknowledged."""
        self._next.logged.append((choice, choice.sequence.num_output_tokens))

    def note_computed(self, sequence: Sequence, has_caught_up: bool) -> None:
        """Records how far a sequence is; one that has caught up needs no record, its log tells."""
        if not has_caught_up:
            self.changes.computed.append((sequence.seq_id, sequence.num_computed_tokens))
        elif sequence.has_computed_record:
            self.changes.computed.append((sequence.seq_id, -1))
        sequence.has_computed_record = not has_caught_up

    def describe(self, sequence: Sequence) -> None:
        """Writes what the sequence is."""
        self.changes.describe.append((sequence.seq_id, SequenceRow.of(sequence).pack()))

    def note_reserved(self, sequence: Sequence) -> None:
        """The block manager has reserved for it; plans may name the blocks once that is acknowledged."""
        self._next.reserved.append((sequence, sequence.attempt, len(sequence.block_ids)))

    def note_copy(self, copy: BlockCopy) -> None:
        """The block manager has forked; a plan may make the copy once that is acknowledged."""
        self._next.copies.append(copy)

    def note_swap(self, swap: Swap) -> None:
        """The swapper has begun it; a plan may name it once that is acknowledged."""
        self._next.swaps.append(swap)

    def accept(self, live: LiveRequest) -> "asyncio.Future[None]":
        """Writes a request's rows; the future is done once it is durable."""
        for choice in live.choices:
            self.describe(choice.sequence)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next.accepted.append((live, accepted))
        return accepted

    def end(self, choice: LiveChoice) -> None:
        """Records `choice.ending` once the logs of all choices are whole; after that their rows go."""
        self._next.ended.append(choice)

    # -- scripts ------------------------------------------------------------------------------------------------------

    def send(self, applied_step_id: int) -> None:
        """Sends what has come together, if anything, as the next script."""
        if not self.changes and not self._next.ended:
            return
        commit, self._next = self._next, _Commit()
        changes = self.changes.take()
        commit.step_id = applied_step_id
        commit.reply = self._store.commit(changes, applied_step_id)
        self._in_flight.append(commit)
        commit.reply.add_done_callback(self._on_reply)

    async def flush(self, applied_step_id: int) -> None:
        """Returns once everything decided so far is in Redis, ends included, or Redis has refused it."""
        while not self.has_lost_ownership and (self.changes or self._next.ended or self._in_flight or self._recordings):
            self.send(applied_step_id)
            replies = [commit.reply for commit in self._in_flight if commit.reply is not None]
            await asyncio.gather(*replies, *self._recordings, return_exceptions=True)
            await asyncio.sleep(0)  # their callbacks

    def _on_reply(self, reply: "asyncio.Future[object]") -> None:
        if reply.cancelled():
            return None
        error = reply.exception()
        if error is not None:
            return self._lose_ownership(error)
        was_full = self.is_full
        commit = self._in_flight.popleft()
        self.num_commits += 1
        self.committed_step_id = max(self.committed_step_id, commit.step_id)
        for sequence, attempt, num_blocks in commit.reserved:
            if sequence.attempt == attempt:
                sequence.num_acked_blocks = num_blocks
        for live, accepted in commit.accepted:
            live.is_accepted = True
            live.notify()
            if not accepted.done():
                accepted.set_result(None)
        if commit.logged:
            self._events.tokens([(c, c.sequence.num_logged_tokens, num_tokens) for c, num_tokens in commit.logged])
        for choice, num_tokens in commit.logged:
            choice.sequence.num_logged_tokens = num_tokens
            choice.request.notify()
        for choice in commit.ended:
            self._end_choice(choice)
        self.acked_copies += commit.copies
        self.acked_swaps += commit.swaps
        if commit.reserved or commit.swaps or was_full:
            self._events.progress()
        return None

    def _end_choice(self, choice: LiveChoice) -> None:
        """The choice's log is whole in Redis: its end is the request's, or, where others run on, may be told now."""
        choice.is_logged = True
        live, ending = choice.request, choice.ending
        assert ending is not None
        if all(other.is_logged for other in live.choices):
            task = asyncio.get_running_loop().create_task(self._record_end(live))
            self._recordings.add(task)
            task.add_done_callback(self._recordings.discard)
        elif live.search is None and not live.is_ranked and ending.reason in _SHOWN_BY_THE_LOG:
            choice.end = _end_state(choice)
            live.notify()

    async def _record_end(self, live: LiveRequest) -> None:
        """The logs are whole in Redis: now the record says so, then the client, and then the rows may go."""
        ends = pack_ends([_end_state(choice) for choice in live.choices])
        try:
            held = await self._requests.end(live.body.request_id, self.owner, ends)
        except OwnershipLostError as error:
            return self._lose_ownership(error)
        for choice, end in zip(live.choices, unpack_ends(held), strict=True):
            choice.end = end
            self.changes.close_row(choice.sequence.seq_id, choice.sequence.segment_first_index)
        self._events.ended(live)
        return None

    def _lose_ownership(self, error: BaseException) -> None:
        self.has_lost_ownership = True
        self._events.lost(f"ownership: {error}")


def _end_state(choice: LiveChoice) -> EndState:
    ending = choice.ending
    assert ending is not None
    return EndState(ending.reason, choice.sequence.num_cached_tokens or 0, ending.status, ending.error)
