"""One worker's state in Redis: packs what the mirror decided, numbers it (epoch, n), and reads it all back.

Decides nothing. What it reads is parsed into plain values; recovery builds mirrors from them.
"""

import asyncio
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from struct import Struct

from scheduler.block_hash import HASH_BYTES
from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.host_pool import HostImage
from scheduler.keys import log_key, worker_key, worker_keys
from scheduler.redis_node import Reply
from scheduler.redis_pipe import Pipe
from scheduler.scripts import RECLAIM, SEIZE, STEP
from scheduler.sequence import Sequence

STEP_KEYS = ("meta", "pool", "index", "tables", "seqs", "computed", "copies", "host", "swap_outs", "swap_ins", "pins")
RECLAIM_KEYS = ("meta", "pool", "host", "index", "tables", "computed", "copies", "swap_outs", "swap_ins", "pins")
POOL_ROW = Struct("<I16s")
NO_HASH = bytes(HASH_BYTES)

SEQ_ID = Struct("<Q")
_SEQ_I32 = Struct("<Qi")
_SEQ_U32 = Struct("<QI")
_U32 = Struct("<I")
_HASHED_BLOCK = Struct("<I16s")
_SWAP = Struct("<I16sI")
_FORK = Struct("<QQIIII")
_COPY = Struct("<II")
_RESERVE = Struct("<QII")
_APPEND = Struct("<III")
_APPEND_ONE = Struct("<IIII")
_SEQ_ROW = Struct("<IIIIi")


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """What Redis keeps of a sequence beside its log and its table."""

    request_id: str
    choice: int
    attempt: int
    num_losses: int
    first_index: int
    """Output index at which the log under this worker begins."""
    num_cached_tokens: int
    """Prompt tokens found in the prefix index at the first admission; -1 before it."""

    @classmethod
    def of(cls, sequence: Sequence) -> "SequenceRow":
        """The row of a sequence as it is now."""
        num_cached = -1 if sequence.num_cached_tokens is None else sequence.num_cached_tokens
        return cls(
            sequence.request_id,
            sequence.choice,
            sequence.attempt,
            sequence.num_losses,
            sequence.segment_first_index,
            num_cached,
        )

    def pack(self) -> bytes:
        """Five little-endian 32-bit words, then the request_id."""
        head = _SEQ_ROW.pack(self.choice, self.attempt, self.num_losses, self.first_index, self.num_cached_tokens)
        return head + self.request_id.encode()

    @classmethod
    def unpack(cls, data: bytes) -> "SequenceRow":
        """The inverse of pack."""
        return cls(data[_SEQ_ROW.size :].decode(), *_SEQ_ROW.unpack_from(data))


@dataclass(frozen=True, slots=True)
class WorkerMeta:
    """A worker's `meta` hash."""

    epoch: int
    n: int
    committed_step_id: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerImage:
    """All that Redis holds of one worker, but for the records of its requests."""

    pool: PoolImage
    rows: dict[int, SequenceRow]
    tables: dict[int, list[int]]
    computed: dict[int, int]
    logs: dict[int, list[int]]
    host: HostImage = field(default_factory=HostImage)
    pins: dict[int, bytes] = field(default_factory=dict)


class WorkerStore:
    """One worker's scripts, numbered from what `seize` found. Not shared between owners."""

    def __init__(self, pipe: Pipe, worker: str, log_ttl_s: int) -> None:
        self._pipe = pipe
        self._worker = worker
        self._log_ttl_s = log_ttl_s
        self._step_keys = worker_keys(worker, STEP_KEYS)
        self._log_keys: dict[int, bytes] = {}  # of sequences whose log begins at 0 and was written to: most, every step
        self.epoch = 0
        self.n = 0

    async def seize(self, highest_epoch: int) -> WorkerMeta:
        """Raises the epoch above all that Redis and the worker have seen; all older owners are fenced from now on."""
        reply = await self._pipe.call(SEIZE, worker_keys(self._worker, ("meta",)), (highest_epoch,))
        assert isinstance(reply, list)
        meta = {bytes(k).decode(): bytes(v).decode() for k, v in zip(reply[::2], reply[1::2], strict=True)}
        self.epoch = int(meta["epoch"])
        self.n = int(meta.get("n", 0))
        return WorkerMeta(
            self.epoch,
            self.n,
            int(meta.get("committed_step_id", 0)),
            meta.get("incarnation", ""),
        )

    def reclaim(self, incarnation: str, num_blocks: int, num_host_blocks: int = 0) -> "asyncio.Future[Reply]":
        """Drops the pools of the old incarnation and lays empty ones for the new (none where it is "")."""
        self.n += 1
        keys = worker_keys(self._worker, RECLAIM_KEYS)
        return self._pipe.call(RECLAIM, keys, (self.epoch, self.n, incarnation, num_blocks, num_host_blocks))

    def commit(self, changes: Changes, committed_step_id: int) -> "asyncio.Future[Reply]":
        """Sends the next script; its future raises ResponseError where Redis refuses it."""
        self.n += 1
        keys: list[str | bytes] = list(self._step_keys)
        packed = self._pack_rows(changes, keys)
        return self._pipe.call(STEP, keys, (self.epoch, self.n, committed_step_id, self._log_ttl_s, *packed))

    def _pack_rows(self, changes: Changes, keys: list[str | bytes]) -> list[bytes]:
        segments, log_keys = changes.segments, self._log_keys
        num_keys = len(keys)
        appends: list[bytes] = []
        for seq_id, offset, token_ids in changes.append:
            key = None if seq_id in segments else log_keys.get(seq_id)
            keys.append(key or self._log_key(seq_id, segments))
            num_keys += 1
            if len(token_ids) == 1:
                appends.append(_APPEND_ONE.pack(num_keys, offset, 1, token_ids[0]))
            else:
                appends.append(_APPEND.pack(num_keys, offset, len(token_ids)) + array("I", token_ids).tobytes())
        closes: list[bytes] = []
        for seq_id in changes.close:
            keys.append(self._log_key(seq_id, segments))
            closes.append(_SEQ_U32.pack(seq_id, len(keys)))
        for seq_id in (*changes.close, *changes.forget):
            log_keys.pop(seq_id, None)
        return [
            b"".join(appends),
            b"".join([_HASHED_BLOCK.pack(*row) for row in changes.publish]),
            array("I", changes.copied).tobytes(),
            array("I", changes.swapped_out).tobytes(),
            array("I", changes.swapped_in).tobytes(),
            b"".join([SEQ_ID.pack(seq_id) for seq_id in changes.release]),
            b"".join([_FORK.pack(*row) for row in changes.fork]),
            b"".join([_SEQ_U32.pack(seq_id, len(row)) + row for seq_id, row in changes.describe]),
            b"".join([_SEQ_I32.pack(*row) for row in changes.computed]),
            b"".join([_pack_reserve(*row) for row in changes.reserve]),
            b"".join([_SWAP.pack(*row) for row in changes.swap_out]),
            b"".join([_SWAP.pack(*row) for row in changes.swap_in]),
            b"".join([_SEQ_U32.pack(pin_id, len(record)) + record for pin_id, record in changes.pin]),
            b"".join(closes),
            b"".join([SEQ_ID.pack(seq_id) for seq_id in changes.forget]),
        ]

    def _log_key(self, seq_id: int, segments: dict[int, int]) -> bytes:
        if seq_id in segments:
            return log_key(self._worker, seq_id, segments[seq_id])
        key = self._log_keys[seq_id] = log_key(self._worker, seq_id)
        return key

    async def load(self) -> WorkerImage:
        """Everything under the worker's tag."""
        pools = [self._pipe.send("GET", key) for key in worker_keys(self._worker, ("pool", "host"))]
        parts = ("seqs", "tables", "computed", "copies", "pins", "swap_outs", "swap_ins")
        hashes = [self._pipe.send("HGETALL", key) for key in worker_keys(self._worker, parts)]
        pool, host = (_parse_pool(reply) for reply in await asyncio.gather(*pools))
        seqs, tables, computed, copies, pins, *swaps = (as_dict(reply) for reply in await asyncio.gather(*hashes))
        swap_outs, swap_ins = ({int(k): _U32.unpack(v)[0] for k, v in swap.items()} for swap in swaps)
        rows = {SEQ_ID.unpack(k)[0]: SequenceRow.unpack(v) for k, v in seqs.items()}
        segments = [(seq_id, row.first_index) for seq_id, row in rows.items()]
        logs = await asyncio.gather(*(load_log(self._pipe, self._worker, *segment) for segment in segments))
        return WorkerImage(
            PoolImage(*pool, {int(k): _COPY.unpack(v) for k, v in copies.items()}),
            rows,
            {SEQ_ID.unpack(k)[0]: array("I", v).tolist() for k, v in tables.items()},
            {SEQ_ID.unpack(k)[0]: int(v) for k, v in computed.items()},
            dict(zip(rows, logs, strict=True)),
            HostImage(*host, swap_outs, swap_ins),
            {SEQ_ID.unpack(k)[0]: v for k, v in pins.items()},
        )

    async def load_index(self) -> dict[bytes, int]:
        """The stored index, for anti-entropy: it must equal what the pool's own hashes say."""
        index = as_dict(await self._pipe.send("HGETALL", worker_key(self._worker, "index")))
        return {hash_: int(block_id) for hash_, block_id in index.items()}


async def load_log(pipe: Pipe, worker: str, seq_id: int, first_index: int) -> list[int]:
    """Token ids of one segment; empty where there is none."""
    reply = await pipe.send("GET", log_key(worker, seq_id, first_index))
    return array("I", reply).tolist() if isinstance(reply, bytes) else []


def _pack_reserve(seq_id: int, shared: Seq[tuple[int, bytes]], new: Seq[int]) -> bytes:
    parts = [_RESERVE.pack(seq_id, len(shared), len(new))]
    parts += [_HASHED_BLOCK.pack(*row) for row in shared]
    parts.append(array("I", new).tobytes())
    return b"".join(parts)


def _parse_pool(reply: Reply) -> tuple[int, dict[int, int], dict[int, bytes]]:
    """A pool's string: how many blocks there are, their ref_counts and their hashes."""
    data = reply if isinstance(reply, bytes) else b""
    ref_counts: dict[int, int] = {}
    hashes: dict[int, bytes] = {}
    for block_id, (ref_count, hash_) in enumerate(POOL_ROW.iter_unpack(data)):
        if ref_count:
            ref_counts[block_id] = ref_count
        if hash_ != NO_HASH:
            hashes[block_id] = hash_
    return max(0, len(data) // POOL_ROW.size - 1), ref_counts, hashes


def as_dict(reply: Reply) -> dict[bytes, bytes]:
    """What HGETALL answers."""
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))
