"""The typed face of the Lua scripts: packs what the mirror decided, and numbers it (epoch, n).

Decides nothing. Everything it reads back is parsed into plain values; recovery builds mirrors from them.
"""

import asyncio
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from struct import Struct

from redis.exceptions import ResponseError

from scheduler.block_hash import HASH_BYTES
from scheduler.block_manager import PoolImage
from scheduler.changes import Changes
from scheduler.keys import ID_COUNTER, REGISTRY, log_key, request_key, worker_key, worker_keys
from scheduler.lua import load_script
from scheduler.redis_pipe import RedisPipe, Reply, Script
from scheduler.sequence import Sequence

STEP_KEYS = ("meta", "pool", "index", "tables", "seqs", "computed", "copies")
RECLAIM_KEYS = ("meta", "pool", "index", "tables", "computed", "copies")
POOL_ROW = Struct("<I16s")
NO_HASH = bytes(HASH_BYTES)

_SEQ = Struct("<Q")
_SEQ_I32 = Struct("<Qi")
_SEQ_U32 = Struct("<QI")
_U32 = Struct("<I")
_HASHED_BLOCK = Struct("<I16s")
_FORK = Struct("<QQIIII")
_RESERVE = Struct("<QII")
_APPEND = Struct("<III")
_APPEND_ONE = Struct("<IIII")
_SEQ_ROW = Struct("<IIIIi")

STEP, SEIZE, RECLAIM = (Script(load_script(name)) for name in ("step", "seize", "reclaim"))
REQUEST_CREATE, REQUEST_OWN, REQUEST_END = (
    Script(load_script(name)) for name in ("request_create", "request_own", "request_end")
)
ALL_SCRIPTS = (STEP, SEIZE, RECLAIM, REQUEST_CREATE, REQUEST_OWN, REQUEST_END)


class OwnershipLostError(Exception):
    """Redis refused a numbered script: another owner has the worker, or the mirror is not what Redis holds."""


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
    num_blocks: int


@dataclass(frozen=True, slots=True)
class WorkerImage:
    """All that Redis holds of one worker, but for the records of its requests."""

    pool: PoolImage
    rows: dict[int, SequenceRow]
    tables: dict[int, list[int]]
    computed: dict[int, int]
    logs: dict[int, list[int]]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request's record; `end` is empty while it lives."""

    body: bytes
    digest: bytes
    seq_id: int
    worker: str
    epoch: int
    placements: tuple[tuple[str, int], ...]
    """(worker, output index from which it logs), in order."""
    end: bytes


class WorkerStore:
    """One worker's scripts, numbered from what `seize` found. Not shared between owners."""

    def __init__(self, pipe: RedisPipe, worker: str, log_ttl_s: int) -> None:
        self._pipe = pipe
        self._worker = worker
        self._log_ttl_s = log_ttl_s
        self._step_keys = worker_keys(worker, STEP_KEYS)
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
            int(meta.get("num_blocks", 0)),
        )

    def reclaim(self, incarnation: str, num_blocks: int) -> "asyncio.Future[Reply]":
        """Drops the pool of the old incarnation and lays an empty one for the new (none where it is "")."""
        self.n += 1
        keys = worker_keys(self._worker, RECLAIM_KEYS)
        return self._pipe.call(RECLAIM, keys, (self.epoch, self.n, incarnation, num_blocks))

    def commit(self, changes: Changes, committed_step_id: int) -> "asyncio.Future[Reply]":
        """Sends the next script; its future raises ResponseError where Redis refuses it."""
        self.n += 1
        keys: list[str | bytes] = list(self._step_keys)
        packed = self._pack_rows(changes, keys)
        return self._pipe.call(STEP, keys, (self.epoch, self.n, committed_step_id, self._log_ttl_s, *packed))

    def _pack_rows(self, changes: Changes, keys: list[str | bytes]) -> list[bytes]:
        appends: list[bytes] = []
        for seq_id, offset, token_ids in changes.append:
            keys.append(log_key(self._worker, seq_id))
            if len(token_ids) == 1:
                appends.append(_APPEND_ONE.pack(len(keys), offset, 1, token_ids[0]))
            else:
                appends.append(_APPEND.pack(len(keys), offset, len(token_ids)) + array("I", token_ids).tobytes())
        closes: list[bytes] = []
        for seq_id in changes.close:
            keys.append(log_key(self._worker, seq_id))
            closes.append(_SEQ_U32.pack(seq_id, len(keys)))
        return [
            b"".join(appends),
            b"".join([_SEQ_I32.pack(*row) for row in changes.computed]),
            b"".join([_HASHED_BLOCK.pack(*row) for row in changes.publish]),
            array("I", changes.copied).tobytes(),
            b"".join([_FORK.pack(*row) for row in changes.fork]),
            b"".join([_SEQ.pack(seq_id) for seq_id in changes.release]),
            b"".join([_SEQ_U32.pack(seq_id, len(row)) + row for seq_id, row in changes.describe]),
            b"".join([_pack_reserve(*row) for row in changes.reserve]),
            b"".join(closes),
            b"".join([_SEQ.pack(seq_id) for seq_id in changes.forget]),
        ]

    async def load(self, num_blocks: int) -> WorkerImage:
        """Everything under the worker's tag."""
        parts = ("pool", "seqs", "tables", "computed", "copies")
        keys = worker_keys(self._worker, parts)
        verbs = ("GET", "HGETALL", "HGETALL", "HGETALL", "HGETALL")
        replies = await asyncio.gather(*(self._pipe.send(v, k) for v, k in zip(verbs, keys, strict=True)))
        seqs, tables, computed, copies = (_as_dict(reply) for reply in replies[1:])
        rows = {_SEQ.unpack(k)[0]: SequenceRow.unpack(v) for k, v in seqs.items()}
        logs = await asyncio.gather(*(self.load_log(self._worker, seq_id) for seq_id in rows))
        pool = replies[0]
        return WorkerImage(
            _parse_pool(pool if isinstance(pool, bytes) else b"", num_blocks, copies),
            rows,
            {_SEQ.unpack(k)[0]: array("I", v).tolist() for k, v in tables.items()},
            {_SEQ.unpack(k)[0]: int(v) for k, v in computed.items()},
            dict(zip(rows, logs, strict=True)),
        )

    async def load_index(self) -> dict[bytes, int]:
        """The stored index, for anti-entropy: it must equal what the pool's own hashes say."""
        index = _as_dict(await self._pipe.send("HGETALL", worker_key(self._worker, "index")))
        return {hash_: int(block_id) for hash_, block_id in index.items()}

    async def load_log(self, worker: str, seq_id: int) -> list[int]:
        """Token ids of one segment."""
        return await load_log(self._pipe, worker, seq_id)


class RequestStore:
    """Records of requests, the registry of workers, and ids."""

    def __init__(self, pipe: RedisPipe, record_ttl_s: int, request_ttl_s: int) -> None:
        self._pipe = pipe
        self._record_ttl_s = record_ttl_s
        self._request_ttl_s = request_ttl_s

    async def next_seq_id_prefix(self) -> int:
        """A number that no other start of a scheduler has; shifted by 32 bits it makes seq_ids unique for all time."""
        reply = await self._pipe.send("INCR", ID_COUNTER)
        assert isinstance(reply, int)
        return reply

    async def register_worker(self, worker: str) -> None:
        """Enters a name into the registry."""
        await self._pipe.send("SADD", REGISTRY, worker)

    async def worker_names(self) -> list[str]:
        """All names that ever registered, sorted."""
        reply = await self._pipe.send("SMEMBERS", REGISTRY)
        assert isinstance(reply, list)
        return sorted(bytes(name).decode() for name in reply)

    async def create(
        self, request_id: str, digest: bytes, body: bytes, owner: tuple[str, int], seq_id: int
    ) -> tuple[bool, bytes, int]:
        """Writes a record. Returns (whether it is ours, digest, seq_id) of the one that now exists."""
        args = (digest, body, *owner, seq_id, self._request_ttl_s)
        reply = await self._pipe.call(REQUEST_CREATE, [request_key(request_id)], args)
        assert isinstance(reply, list)
        held_seq_id = int(reply[2])
        return (bool(reply[0]) or held_seq_id == seq_id, bytes(reply[1]), held_seq_id)

    async def own(self, request_id: str, owner: tuple[str, int], old_worker: str, first_index: int) -> bool:
        """Makes `owner` = (worker, epoch) the request's; False where it is gone or ended."""
        args = (*owner, old_worker, first_index, self._request_ttl_s)
        try:
            return bool(await self._pipe.call(REQUEST_OWN, [request_key(request_id)], args))
        except ResponseError as error:
            raise OwnershipLostError(str(error)) from None

    async def end(self, request_id: str, owner: tuple[str, int], end: bytes) -> bytes:
        """Records how the request ended, once; returns what holds."""
        args = (*owner, end, self._record_ttl_s)
        try:
            reply = await self._pipe.call(REQUEST_END, [request_key(request_id)], args)
        except ResponseError as error:
            raise OwnershipLostError(str(error)) from None
        assert isinstance(reply, bytes)
        return reply

    async def is_enrolled(self, worker: str, seq_id: int) -> bool:
        """Whether a worker has a row of this sequence."""
        return bool(await self._pipe.send("HEXISTS", worker_key(worker, "seqs"), _SEQ.pack(seq_id)))

    async def expire_log(self, worker: str, seq_id: int) -> None:
        """Lets a segment that an ended request left on an earlier worker expire."""
        await self._pipe.send("EXPIRE", log_key(worker, seq_id), self._record_ttl_s)

    async def load(self, request_id: str) -> RequestRecord | None:
        """A record, or None where there is none."""
        record = _as_dict(await self._pipe.send("HGETALL", request_key(request_id)))
        if b"digest" not in record:
            return None
        lines = record[b"placements"].decode().split("\n")
        return RequestRecord(
            record[b"body"],
            record[b"digest"],
            int(record[b"seq_id"]),
            record[b"worker"].decode(),
            int(record[b"epoch"]),
            tuple((line.rsplit(" ", 1)[0], int(line.rsplit(" ", 1)[1])) for line in lines),
            record.get(b"end", b""),
        )

    async def load_output(self, record: RequestRecord) -> list[int]:
        """All logged output token ids, over all workers that it was placed with."""
        logs = await asyncio.gather(*(load_log(self._pipe, w, record.seq_id) for w, _ in record.placements))
        output: list[int] = []
        for (_, first_index), tokens in zip(record.placements, logs, strict=True):
            del output[first_index:]
            output += tokens
        return output


async def load_log(pipe: RedisPipe, worker: str, seq_id: int) -> list[int]:
    """Token ids of one segment; empty where there is none."""
    reply = await pipe.send("GET", log_key(worker, seq_id))
    return array("I", reply).tolist() if isinstance(reply, bytes) else []


def _pack_reserve(seq_id: int, shared: Seq[tuple[int, bytes]], new: Seq[int]) -> bytes:
    parts = [_RESERVE.pack(seq_id, len(shared), len(new))]
    parts += [_HASHED_BLOCK.pack(*row) for row in shared]
    parts.append(array("I", new).tobytes())
    return b"".join(parts)


def _parse_pool(data: bytes, num_blocks: int, copies: dict[bytes, bytes]) -> PoolImage:
    ref_counts: dict[int, int] = {}
    hashes: dict[int, bytes] = {}
    for block_id, (ref_count, hash_) in enumerate(POOL_ROW.iter_unpack(data)):
        if ref_count:
            ref_counts[block_id] = ref_count
        if hash_ != NO_HASH:
            hashes[block_id] = hash_
    pairs = {int(k): Struct("<II").unpack(v) for k, v in copies.items()}
    return PoolImage(num_blocks, ref_counts, hashes, {k: (v[0], v[1]) for k, v in pairs.items()})


def _as_dict(reply: Reply) -> dict[bytes, bytes]:
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))
