"""Builds sequences back from Redis: after a restart of the scheduler, the loss of a worker, and for a move.

One path for all three. What Redis says holds; a request that is still live in this process keeps its streams.
"""

import asyncio
from dataclasses import dataclass, replace
from enum import Enum

from scheduler.block_hash import extend_chain, root_hash
from scheduler.block_manager import PoolImage
from scheduler.detokenizer import TextStream
from scheduler.live_request import Ending, EndState, LiveRequest, LiveRequests
from scheduler.request import RequestBody
from scheduler.request_store import RequestRecord, RequestStore
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
    """What a row under a worker's tag turns out to be."""

    LIVE = "live"
    OVER = "over"
    """Its request has ended, or its record has expired: the row goes."""
    MOVED = "moved"
    """Its request runs on under another worker's tag, and a cut-short move has left the row behind: it goes too."""


@dataclass(frozen=True, slots=True)
class Revived:
    """A sequence's row and what it is; of a LIVE one the request, and the worker that its record names."""

    seq_id: int
    state: RowState
    first_index: int
    """Output index at which the log under the worker's tag begins."""
    live: LiveRequest | None = None
    recorded_worker: str = ""


class Reviver:
    """Makes LiveRequests: new ones from bodies, old ones from Redis."""

    def __init__(self, tokenizer: Tokenizer, requests: RequestStore, live_requests: LiveRequests) -> None:
        self._tokenizer = tokenizer
        self._requests = requests
        self._live_requests = live_requests
        self.model: ModelIdentity | None = None
        """Known once a worker has registered."""

    def create(self, body: RequestBody, seq_id: int) -> LiveRequest:
        """A request that has generated nothing yet."""
        return LiveRequest(body, self._sequence(body, seq_id, []), self._stop_text(body))

    def ended(self, record: RequestRecord, output: list[int]) -> LiveRequest:
        """A request that is over, for streams that read it once more."""
        body = RequestBody.from_bytes(record.body, record.digest)
        live = LiveRequest(body, self._sequence(body, record.seq_id, output), is_accepted=True)
        live.end = EndState.unpack(record.end)
        return live

    async def revive(self, worker: str, image: WorkerImage) -> list[Revived]:
        """All sequences that a worker has a row of, by arrival."""
        revived = await asyncio.gather(*(self._revive(worker, seq_id, row) for seq_id, row in image.rows.items()))
        return sorted(revived, key=lambda r: r.seq_id)

    async def _revive(self, worker: str, seq_id: int, row: SequenceRow) -> Revived:
        record = await self._requests.load(row.request_id)
        if record is None or record.end or record.seq_id != seq_id:
            return Revived(seq_id, RowState.OVER, row.first_index)
        if record.worker != worker and await self._requests.is_enrolled(record.worker, seq_id):
            return Revived(seq_id, RowState.MOVED, row.first_index)
        body = RequestBody.from_bytes(record.body, record.digest)
        output = await self._requests.load_output(record)
        sequence = self._sequence(body, seq_id, output)
        sequence.attempt = row.attempt
        sequence.num_losses = row.num_losses
        sequence.segment_first_index = row.first_index
        sequence.num_cached_tokens = None if row.num_cached_tokens < 0 else row.num_cached_tokens
        live = self._live_requests.get(row.request_id)
        if live is None or live.is_orphaned:
            live = LiveRequest(body, sequence)
            self._live_requests.add(live)
            self._live_requests.expect_client(live)
        live.sequence = sequence
        live.is_accepted = True
        live.stop_text = self._stop_text(body)
        live.ending = live.ending or self._tail_ending(live) or self._loss_ending(sequence)
        return Revived(seq_id, RowState.LIVE, row.first_index, live, record.worker)

    def _tail_ending(self, live: LiveRequest) -> Ending | None:
        """The end that the log's tail shows, where its owner died before it recorded it."""
        output = live.sequence.output_token_ids
        if live.stop_text is not None:
            live.stop_text.push(output)
            live.stop_text.take()
            if live.stop_text.stopped:
                return Ending(FinishReason.STOP)
        if output and output[-1] in live.sequence.limits.end_token_ids:
            return Ending(FinishReason.STOP)
        if len(output) >= live.sequence.limits.max_output_tokens:
            return Ending(FinishReason.LENGTH)
        return None

    def _loss_ending(self, sequence: Sequence) -> Ending | None:
        return LOST_TOO_OFTEN if sequence.num_losses >= MAX_LOSSES else None

    def _sequence(self, body: RequestBody, seq_id: int, output: list[int]) -> Sequence:
        s = body.sampling
        eos = () if s.ignore_eos else self._tokenizer.eos_token_ids
        limits = SequenceLimits(s.max_tokens, frozenset((*eos, *s.stop_token_ids)), s.ignore_eos)
        sequence = Sequence(
            seq_id=seq_id,
            request_id=body.request_id,
            choice=0,
            token_ids=[*body.prompt_token_ids, *output],
            num_prompt_tokens=len(body.prompt_token_ids),
            limits=limits,
            root_hash=b"",
            priority=body.priority,
            tenant=body.tenant,
            num_logged_tokens=len(output),
        )
        if self.model is not None:  # else nothing runs: no worker has come yet, and each one's coming revives anew
            sequence.root_hash = root_hash(self.model.fingerprint, self.model.kv_dtype, "", body.cache_salt)
            extend_chain(sequence.root_hash, sequence.block_hashes, sequence.token_ids, self.model.block_size)
        return sequence

    def _stop_text(self, body: RequestBody) -> TextStream | None:
        return TextStream(self._tokenizer, body.sampling.stop) if body.sampling.stop else None


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
    """The image after its incarnation died: its pool is void; what ran has lost its blocks, and counts the loss."""
    rows = {
        seq_id: replace(row, attempt=row.attempt + 1, num_losses=row.num_losses + 1) if seq_id in image.tables else row
        for seq_id, row in image.rows.items()
    }
    return replace(image, pool=PoolImage(0, {}, {}, {}), rows=rows, tables={}, computed={})
