"""Rows that no owner may send: every way in which a script's content can disagree with what Redis holds."""

from collections.abc import Callable, Iterator

from scheduler.changes import Changes
from scheduler.store import NO_HASH, WorkerImage

NOBODY = 10_000
"""A sequence that never was."""
OTHER_HASH = b"\xee" * 16


def wrong_changes(image: WorkerImage) -> list[tuple[str, Changes]]:
    """(what is wrong, the rows) for every case that this state allows."""
    cases = (_appends, _publishes, _reservations, _shares, _forks, _swaps, _pins, _ends)
    return [case for make in cases for case in make(image)]


Cases = Iterator[tuple[str, Changes]]


def _appends(image: WorkerImage) -> Cases:
    yield "append behind a gap", Changes(append=[(NOBODY, 1, [7])])
    for seq_id, log in image.logs.items():
        if log:
            yield "append where a token is", Changes(append=[(seq_id, len(log) - 1, [7])])
            return


def _publishes(image: WorkerImage) -> Cases:
    pool = image.pool
    yield "publish of the null block", Changes(publish=[(0, OTHER_HASH)])
    yield "publish outside the pool", Changes(publish=[(pool.num_blocks + 1, OTHER_HASH)])
    for block_id in _first(pool.num_blocks, lambda i: not pool.ref_counts.get(i)):
        yield "publish of an unreferenced block", Changes(publish=[(block_id, OTHER_HASH)])
    for block_id in _first(pool.num_blocks, lambda i: bool(pool.ref_counts.get(i)) and i in pool.hashes):
        yield "publish of a block that has a hash", Changes(publish=[(block_id, OTHER_HASH)])
    unpublished = [i for i in pool.ref_counts if i not in pool.hashes]
    if unpublished:
        yield "publish of no hash", Changes(publish=[(unpublished[0], NO_HASH)])
    if unpublished and pool.hashes:
        taken = next(iter(pool.hashes.values()))
        yield "publish of a hash that another block has", Changes(publish=[(unpublished[0], taken)])
    if len(unpublished) > 1:
        twice = [(block_id, OTHER_HASH) for block_id in unpublished[:2]]
        yield "publish of one hash twice in a script", Changes(publish=twice)


def _reservations(image: WorkerImage) -> Cases:
    pool = image.pool
    yield "reserve of the null block", Changes(reserve=[(NOBODY, [], [0])])
    yield "reserve outside the pool", Changes(reserve=[(NOBODY, [], [pool.num_blocks + 1])])
    for block_id in _first(pool.num_blocks, lambda i: not pool.ref_counts.get(i)):
        yield "reserve of one block twice", Changes(reserve=[(NOBODY, [], [block_id, block_id])])
        yield "reserve behind a wrong row", Changes(reserve=[(NOBODY, [], [block_id]), (NOBODY + 1, [], [0])])
    for block_id in _first(pool.num_blocks, lambda i: bool(pool.ref_counts.get(i))):
        yield "reserve of a referenced block", Changes(reserve=[(NOBODY, [], [block_id])])


def _shares(image: WorkerImage) -> Cases:
    pool = image.pool
    yield "share of the null block", Changes(reserve=[(NOBODY, [(0, NO_HASH)], [])])
    for block_id in _first(pool.num_blocks, lambda i: i in pool.hashes):
        yield "share of a block that holds another hash", Changes(reserve=[(NOBODY, [(block_id, OTHER_HASH)], [])])
        evicted = [(NOBODY, [], [block_id]), (NOBODY + 1, [(block_id, pool.hashes[block_id])], [])]
        yield "share of a block evicted in the same script", Changes(reserve=evicted)
    for block_id in _first(pool.num_blocks, lambda i: i not in pool.hashes):
        yield "share of an unpublished block", Changes(reserve=[(NOBODY, [(block_id, OTHER_HASH)], [])])
        yield "share of no hash", Changes(reserve=[(NOBODY, [(block_id, NO_HASH)], [])])


def _forks(image: WorkerImage) -> Cases:
    pool = image.pool
    yield "fork of more blocks than the table has", Changes(fork=[(NOBODY, NOBODY + 1, 1, 0, 0, 0)])
    unused = _unused(image)
    if unused:
        yield "copy of an unreferenced block", Changes(fork=[(NOBODY, NOBODY + 1, 0, unused, unused, 1)])
    for seq_id, table in image.tables.items():
        yield "fork into a sequence that has blocks", Changes(fork=[(seq_id, seq_id, len(table), 0, 0, 0)])
        yield "copy onto a referenced block", Changes(fork=[(seq_id, NOBODY, 0, table[0], table[-1], 1)])
        yield "copy from outside the pool", Changes(fork=[(seq_id, NOBODY, 0, pool.num_blocks + 1, unused or 1, 1)])
        return


def _swaps(image: WorkerImage) -> Cases:
    pool, host = image.pool, image.host
    room = next(_first(host.num_blocks, lambda i: not host.ref_counts.get(i)), 0)
    yield "end of a swap out that does not run", Changes(swapped_out=[host.num_blocks + 1])
    yield "end of a swap in that does not run", Changes(swapped_in=[pool.num_blocks + 1])
    for block_id in _first(pool.num_blocks, lambda i: i in pool.hashes):
        yield "swap out of another content", Changes(swap_out=[(block_id, OTHER_HASH, room)])
        yield "swap out to outside the host", Changes(swap_out=[(block_id, pool.hashes[block_id], host.num_blocks + 1)])
        yield "swap out to one block twice", Changes(swap_out=[(block_id, pool.hashes[block_id], room)] * 2)
        for held in host.ref_counts:
            yield "swap out to a held block", Changes(swap_out=[(block_id, pool.hashes[block_id], held)])
            break
    for block_id in _first(pool.num_blocks, lambda i: i not in pool.hashes):
        yield "swap out of an unpublished block", Changes(swap_out=[(block_id, NO_HASH, room)])
    for host_id, hash_ in host.hashes.items():
        unused = _unused(image)
        yield (
            "swap in of another content",
            Changes(reserve=[(NOBODY, [], [unused])], swap_in=[(host_id, OTHER_HASH, unused)]),
        )
        yield "swap in to a block that nobody reserved", Changes(swap_in=[(host_id, hash_, unused)])
        for block_id in _first(pool.num_blocks, lambda i: i in pool.hashes):
            yield "swap in to a published block", Changes(swap_in=[(host_id, hash_, block_id)])
        break
    for host_id in host.swap_outs:
        yield "end of a swap out twice", Changes(swapped_out=[host_id, host_id])
        break
    for block_id in host.swap_ins:
        yield "end of a swap in twice", Changes(swapped_in=[block_id, block_id])
        break


def _pins(image: WorkerImage) -> Cases:
    yield "pin of a table without blocks", Changes(pin=[(NOBODY, b"a pin")])
    for seq_id in image.tables:
        yield "end of a pin whose table stays", Changes(pin=[(seq_id, b"")])
        yield "pin of a table that goes", Changes(release=[seq_id], pin=[(seq_id, b"a pin")])
        break


def _ends(image: WorkerImage) -> Cases:
    yield "release of a sequence without blocks", Changes(release=[NOBODY])
    idle = next((i for i in range(1, image.pool.num_blocks + 1) if i not in image.pool.copies), NOBODY)
    yield "end of a copy that does not run", Changes(copied=[idle])
    for copy in image.pool.copies:
        yield "end of a copy twice", Changes(copied=[copy, copy])
        yield "copy of a copy that runs", Changes(fork=[(NOBODY, NOBODY + 1, 0, copy, _unused(image) or 1, 1)])
        break
    for seq_id in image.tables:
        yield "close of a sequence that has blocks", Changes(close=[seq_id])
        yield "forget of a sequence that has blocks", Changes(forget=[seq_id])
        yield "release of a sequence twice", Changes(release=[seq_id, seq_id])
        return


def _unused(image: WorkerImage) -> int:
    """A block that could be reserved; 0: none."""
    pool = image.pool
    return next(_first(pool.num_blocks, lambda i: not pool.ref_counts.get(i)), 0)


def _first(num_blocks: int, condition: Callable[[int], bool]) -> Iterator[int]:
    """The first block that fulfils a condition, where there is one."""
    for block_id in range(1, num_blocks + 1):
        if condition(block_id):
            yield block_id
            return
