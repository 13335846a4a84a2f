"""Requests' records in Redis, the registry of workers, and the source of seq_ids. Decides nothing."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import ResponseError

from scheduler.keys import ID_COUNTER, REGISTRY, log_key, request_key, worker_key
from scheduler.redis_pipe import Pipe
from scheduler.scripts import REQUEST_CREATE, REQUEST_END, REQUEST_OWN
from scheduler.store import SEQ_ID, as_dict, load_log


class OwnershipLostError(Exception):
    """Redis refused a numbered script: another owner has the worker, or the mirror is not what Redis holds."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request's record; `end` is empty while it lives."""

    body: bytes
    digest: bytes
    seq_id: int
    """Of choice 0; those of the others follow."""
    worker: str
    epoch: int
    placements: tuple[tuple[str, tuple[int, ...]], ...]
    """(worker, output index of each choice from which it logs), in order."""
    end: bytes

    @property
    def num_choices(self) -> int:
        """Choices of the request."""
        return len(self.placements[0][1])


class RequestStore:
    """Records of requests, the registry of workers, and ids."""

    def __init__(self, pipe: Pipe, record_ttl_s: int, request_ttl_s: int) -> None:
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
        self, request_id: str, digest: bytes, body: bytes, owner: tuple[str, int], seq_ids: range
    ) -> tuple[bool, bytes, int]:
        """Writes a record. Returns (whether it is ours, digest, seq_id of choice 0) of the one that now exists."""
        seq_id = seq_ids.start
        args = (digest, body, *owner, seq_id, self._request_ttl_s, _indexes([0] * len(seq_ids)))
        reply = await self._pipe.call(REQUEST_CREATE, [request_key(request_id)], args)
        assert isinstance(reply, list)
        held_seq_id = int(reply[2])
        return (bool(reply[0]) or held_seq_id == seq_id, bytes(reply[1]), held_seq_id)

    async def own(self, request_id: str, owner: tuple[str, int], old_worker: str, first_indexes: Sequence[int]) -> bool:
        """Makes `owner` = (worker, epoch) the request's, which logs each choice from there on where it is a new worker.

        False where the request is gone or ended.
        """
        args = (*owner, old_worker, _indexes(first_indexes), self._request_ttl_s)
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
        return bool(await self._pipe.send("HEXISTS", worker_key(worker, "seqs"), SEQ_ID.pack(seq_id)))

    async def expire_logs(self, record: RequestRecord) -> None:
        """Lets the segments that an ended request left behind expire."""
        for worker, first_indexes in record.placements:
            for choice, first_index in enumerate(first_indexes):
                await self._pipe.send(
                    "EXPIRE", log_key(worker, record.seq_id + choice, first_index), self._record_ttl_s
                )

    async def load(self, request_id: str) -> RequestRecord | None:
        """A record, or None where there is none."""
        record = as_dict(await self._pipe.send("HGETALL", request_key(request_id)))
        if b"digest" not in record:
            return None
        lines = record[b"placements"].decode().split("\n")
        return RequestRecord(
            record[b"body"],
            record[b"digest"],
            int(record[b"seq_id"]),
            record[b"worker"].decode(),
            int(record[b"epoch"]),
            tuple(_placement(line) for line in lines),
            record.get(b"end", b""),
        )

    async def load_logs(self, record: RequestRecord) -> list[list[int]]:
        """The whole log of each choice, over all workers that the request was placed with."""
        return await asyncio.gather(*(self._load_log(record, choice) for choice in range(record.num_choices)))

    async def _load_log(self, record: RequestRecord, choice: int) -> list[int]:
        segments = [(worker, first_indexes[choice]) for worker, first_indexes in record.placements]
        seq_id = record.seq_id + choice
        logs = await asyncio.gather(*(load_log(self._pipe, worker, seq_id, first) for worker, first in segments))
        whole: list[int] = []
        for (_, first_index), entries in zip(segments, logs, strict=True):
            del whole[first_index:]
            whole += entries
        return whole


def _indexes(first_indexes: Sequence[int]) -> str:
    return ",".join(map(str, first_indexes))


def _placement(line: str) -> tuple[str, tuple[int, ...]]:
    worker, first_indexes = line.rsplit(" ", 1)
    return worker, tuple(map(int, first_indexes.split(",")))
