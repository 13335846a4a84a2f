"""Builds sequences back from Redis: after a restart of the scheduler, the loss of a worker, and for a move.

One path for all three. What Redis says holds; a request that is still live in this process keeps its streams.
"""

import asyncio
from dataclasses import dataclass, replace
from enum import Enum

from scheduler.beam_search import BeamParams, BeamSearch
from scheduler.best_of import from_words
from scheduler.block_hash import extend_chain, root_hash
from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.detokenizer import TextStream
from scheduler.host_pool import HostImage
from scheduler.live_request import Ending, LiveChoice, LiveRequest, LiveRequests, unpack_ends
from scheduler.request import RequestBody
from scheduler.request_store import RequestRecord, RequestStore
from scheduler.results import hypothesis_reason
from scheduler.sequence import FinishReason, Sequence, SequenceLimits, SequenceStatus
from scheduler.store import SequenceRow, WorkerImage
from scheduler.tokenizer import Tokenizer

MAX_LOSSES = 3
LOST_TOO_OFTEN = Ending(FinishReason.ERROR, "INTERNAL", f"its worker died {MAX_LOSSES} times while it ran")


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What goes into every block hash, and what sequences of the model share."""

    fingerprint: str
    kv_dtype: str
    block_size: int


class RowState(Enum):
    """What a request's rows under a worker's tag turn out to be."""

    LIVE = "live"
    OVER = "over"
    """The request has ended, or its record has expired: the rows go."""
    MOVED = "moved"
    """The request runs on under another worker's tag, and a cut-short move has left the rows behind: they go too."""


@dataclass(frozen=True, slots=True)
class Revived:
    """A request's rows and what they are; of LIVE ones the request, and the worker that its record names."""

    state: RowState
    rows: dict[int, SequenceRow]
    """By seq_id, choice by choice."""
    live: LiveRequest | None = None
    recorded_worker: str = ""

    def drop_from(self, changes: Changes) -> None:
        """Lets its rows go: to expire where the request is over, to live on elsewhere where it is not."""
        for seq_id, row in self.rows.items():
            if self.state is RowState.OVER:
                changes.close_row(seq_id, row.first_index)
            else:
                changes.forget.append(seq_id)


class Reviver:
    """Makes LiveRequests: new ones from bodies, old ones from Redis."""

    def __init__(self, tokenizer: Tokenizer, requests: RequestStore, live_requests: LiveRequests) -> None:
        self._tokenizer = tokenizer
        self._requests = requests
        self._live_requests = live_requests
        self.model: ModelIdentity | None = None
        """Known once a worker has registered."""

    def create(self, body: RequestBody, seq_id: int) -> LiveRequest:
        """A request that has generated nothing yet; `seq_id` is that of choice 0."""
        live = LiveRequest(body)
        self._restore(live, seq_id, [[]] * body.num_sequences)
        for choice in live.choices:
            choice.stop_text = self._stop_text(body)
        return live

    def ended(self, record: RequestRecord, logs: list[list[int]]) -> LiveRequest:
        """A request that is over, for streams that read it once more."""
        body = RequestBody.from_bytes(record.body, record.digest)
        live = LiveRequest(body, is_accepted=True)
        self._restore(live, record.seq_id, logs)
        for choice, end in zip(live.choices, unpack_ends(record.end), strict=True):
            choice.is_logged, choice.end = True, end
        return live

    async def revive(self, worker: str, image: WorkerImage) -> list[Revived]:
        """All requests that a worker has rows of, by arrival."""
        requests: dict[tuple[int, str], dict[int, SequenceRow]] = {}
        for seq_id, row in sorted(image.rows.items()):
            requests.setdefault((seq_id - row.choice, row.request_id), {})[seq_id] = row
        return await asyncio.gather(*(self._revive(worker, *key, rows) for key, rows in sorted(requests.items())))

    async def _revive(self, worker: str, seq_id: int, request_id: str, rows: dict[int, SequenceRow]) -> Revived:
        record = await self._requests.load(request_id)
        if record is None or record.end or record.seq_id != seq_id:
            return Revived(RowState.OVER, rows)
        if record.worker != worker and await self._requests.is_enrolled(record.worker, seq_id):
            return Revived(RowState.MOVED, rows)
        body = RequestBody.from_bytes(record.body, record.digest)
        logs = await self._requests.load_logs(record)
        known = self._live_requests.get(request_id)
        live = LiveRequest(body) if known is None or known.is_orphaned else known
        live.is_accepted = True
        self._restore(live, seq_id, logs)
        for choice, row in zip(live.choices, rows.values(), strict=True):
            _restore_row(choice.sequence, row)
            choice.is_logged = False
            choice.stop_text = self._stop_text(body)
            choice.ending = choice.ending or self._tail_ending(choice) or self._loss_ending(choice.sequence)
        if live is not known:
            self._live_requests.add(live)
            self._live_requests.expect_client(live)
        return Revived(RowState.LIVE, rows, live, record.worker)

    def _restore(self, live: LiveRequest, seq_id: int, logs: list[list[int]]) -> None:
        """Gives the choices the sequences that their logs tell of; makes the choices where there are none yet."""
        body, outputs = live.body, logs
        limits = self._sequence_limits(body)
        if body.sampling.beam_width:
            live.search = BeamSearch.replay(_beam_params(body, limits), logs[0])
            live.candidates.clear()
            outputs = [beam.token_ids for beam in live.search.beams]
        logprobs: list[list[float]] = []
        if live.is_ranked:
            outputs, logprobs = map(list, zip(*map(from_words, logs), strict=True))
        sequences = self._sequences(body, limits, seq_id, outputs)
        live.choices = live.choices or [LiveChoice(live, sequence) for sequence in sequences]
        for choice, sequence in zip(live.choices, sequences, strict=True):
            sequence.admissions = choice.sequence.admissions
            choice.sequence = sequence
        for sequence, own in zip(sequences, logprobs, strict=False):  # none where nothing is ranked
            sequence.logprobs = own
        if live.search is not None:
            for sequence in sequences:
                sequence.num_candidates = live.search.params.num_candidates
                sequence.num_logged_tokens = 0
            if live.search.is_done:
                for choice in live.take_hypotheses():
                    choice.sequence.num_logged_tokens = choice.sequence.num_output_tokens

    def _tail_ending(self, choice: LiveChoice) -> Ending | None:
        """The end that the log's tail shows, where its owner died before it recorded it."""
        search = choice.request.search
        if search is not None:
            return Ending(hypothesis_reason(choice)) if search.is_done else None
        output = choice.sequence.output_token_ids
        if choice.stop_text is not None:
            choice.stop_text.push(output)
            choice.stop_text.take()
            if choice.stop_text.stopped:
                return Ending(FinishReason.STOP)
        if output and output[-1] in choice.sequence.limits.end_token_ids:
            return Ending(FinishReason.STOP)
        if len(output) >= choice.sequence.limits.max_output_tokens:
            return Ending(FinishReason.LENGTH)
        return None

    def _loss_ending(self, sequence: Sequence) -> Ending | None:
        return LOST_TOO_OFTEN if sequence.num_losses >= MAX_LOSSES else None

    def _sequence_limits(self, body: RequestBody) -> SequenceLimits:
        s = body.sampling
        eos = () if s.ignore_eos else self._tokenizer.eos_token_ids
        return SequenceLimits(s.max_tokens, frozenset((*eos, *s.stop_token_ids)), s.ignore_eos)

    def _sequences(
        self, body: RequestBody, limits: SequenceLimits, seq_id: int, outputs: list[list[int]]
    ) -> list[Sequence]:
        """A sequence for each choice, from `seq_id` on, with what it has generated."""
        root, hashes = b"", list[bytes]()
        if self.model is not None:  # else nothing runs: no worker has come yet, and each one's coming revives anew
            root = root_hash(self.model.fingerprint, self.model.kv_dtype, "", body.cache_salt)
            extend_chain(root, hashes, body.prompt_token_ids, self.model.block_size)
        return [
            Sequence(
                seq_id=seq_id + choice,
                request_id=body.request_id,
                choice=choice,
                token_ids=[*body.prompt_token_ids, *output],
                num_prompt_tokens=len(body.prompt_token_ids),
                limits=limits,
                root_hash=root,
                priority=body.priority,
                tenant=body.tenant,
                pin_s=0.0 if choice or output else body.pin_prompt_s,
                block_hashes=list(hashes),
                num_logged_tokens=len(output),
            )
            for choice, output in enumerate(outputs)
        ]

    def _stop_text(self, body: RequestBody) -> TextStream | None:
        return TextStream(self._tokenizer, body.sampling.stop) if body.sampling.stop else None


def _beam_params(body: RequestBody, limits: SequenceLimits) -> BeamParams:
    s = body.sampling
    return BeamParams(s.beam_width, s.length_penalty, s.early_stopping, s.max_tokens, limits.end_token_ids)


def _restore_row(sequence: Sequence, row: SequenceRow) -> None:
    sequence.attempt = row.attempt
    sequence.num_losses = row.num_losses
    sequence.segment_first_index = row.first_index
    sequence.num_cached_tokens = None if row.num_cached_tokens < 0 else row.num_cached_tokens


def restore_running(sequence: Sequence, image: WorkerImage, block_size: int) -> None:
    """Gives a sequence of a pool that lives on its blocks and progress back."""
    sequence.status = SequenceStatus.RUNNING
    sequence.block_ids = list(image.tables[sequence.seq_id])
    sequence.num_acked_blocks = len(sequence.block_ids)
    computed = image.computed.get(sequence.seq_id)
    sequence.has_computed_record = computed is not None
    sequence.num_computed_tokens = len(sequence.token_ids) - 1 if computed is None else computed
    sequence.num_planned_tokens = sequence.num_computed_tokens
    sequence.num_published_blocks = sequence.num_computed_tokens // block_size
    shared = (image.pool.ref_counts.get(block_id, 0) > 1 for block_id in sequence.block_ids)
    sequence.num_shared_blocks = next((i for i, is_shared in enumerate(shared) if not is_shared), 0)


def lose_worker(image: WorkerImage) -> WorkerImage:
    """The image after its incarnation died: its pools are void; what ran has lost its blocks, and counts the loss."""
    rows = {
        seq_id: replace(row, attempt=row.attempt + 1, num_losses=row.num_losses + 1) if seq_id in image.tables else row
        for seq_id, row in image.rows.items()
    }
    return replace(image, pool=PoolImage(0, {}, {}, {}), host=HostImage(), pins={}, rows=rows, tables={}, computed={})
