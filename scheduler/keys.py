"""Every name that is written to Redis. All keys that one step touches share the worker's hash tag.

Left behind after a run, by design: the registry, the id counter, and of each worker `meta`, `pool`, `index` (they
describe its cached blocks); everything else is deleted or expires.
"""

from collections.abc import Sequence

REGISTRY = "pagoda:workers"
"""Set of the names of all workers that ever registered."""

ID_COUNTER = "pagoda:seq_id_prefix"
"""Counts starts of schedulers; the upper half of a seq_id."""


def worker_key(worker: str, part: str) -> str:
    """One of a worker's keys: meta, pool, index, tables, seqs, computed, copies."""
    return f"{{w:{worker}}}:{part}"


def log_key(worker: str, seq_id: int, first_index: int = 0) -> bytes:
    """A segment of a sequence's output token ids (or words), from `first_index` on: packed little-endian u32.

    A sequence that comes back to a worker begins another segment there.
    """
    if first_index:
        return b"{w:%b}:log:%x:%d" % (worker.encode(), seq_id, first_index)
    return b"{w:%b}:log:%x" % (worker.encode(), seq_id)


def request_key(request_id: str) -> str:
    """A request's record."""
    return f"{{r:{request_id}}}"


def worker_keys(worker: str, parts: Sequence[str]) -> list[str]:
    """Several of a worker's keys, in order."""
    return [worker_key(worker, part) for part in parts]
