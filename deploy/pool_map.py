"""Draws a pool as a map: a cell per block, or per so many blocks that the map fits. Pure: columns in, text out."""

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from pagoda.v1 import generation_pb2 as pb
from rich.text import Text

MIN_CELLS_PER_ROW, MAX_CELLS_PER_ROW = 16, 128
_MARGIN = 15
"""Columns beside a row's cells: the id of its first block, and the shares of a large pool."""
LEGEND = "· free   - cached   = cached and hit: kept longer   1-9, + in so many tables"
HOST_LEGEND = "on the host: * kept for a preempted sequence   ~ moving"
SHADED_LEGEND = "· - = mostly free, cached, cached and hit   ░▒▓█ to 25, 50, 75, 100 % in tables"
_SHADES = "░▒▓█"
_MOVING = ("~", "green")
_LOOKS: dict[int, tuple[str, str]] = {
    pb.BLOCK_STATE_FREE: ("·", "dim"),
    pb.BLOCK_STATE_CACHED: ("-", "blue"),
    pb.BLOCK_STATE_PROTECTED: ("=", "cyan"),
    pb.BLOCK_STATE_SET_ASIDE: ("*", "magenta"),
}


@dataclass(frozen=True, slots=True)
class MapSize:
    """What there is room for."""

    width: int
    """Columns of the terminal."""
    max_rows: int
    """Rows of cells for one pool."""

    @property
    def cells_per_row(self) -> int:
        """A power of two, so that block ids are easy to find."""
        cells = MIN_CELLS_PER_ROW
        while cells < MAX_CELLS_PER_ROW and 2 * cells + _MARGIN <= self.width:
            cells *= 2
        return cells

    def blocks_per_cell(self, num_blocks: int) -> int:
        """1, 2, 5, 10, 20, 50 ...: the least with which a pool has no more rows than it may."""
        num_cells = self.cells_per_row * self.max_rows
        scale = 1
        while num_blocks > 5 * scale * num_cells:
            scale *= 10
        return next(step * scale for step in (1, 2, 5) if num_blocks <= step * scale * num_cells)


def draw_pool(pool: pb.PoolBlocks, size: MapSize) -> Text:
    """A line that counts, then the map; each row begins with the id of its first block. Then the same for the host."""
    text = Text()
    text.append(pool.worker, "bold")
    if pool.state != pb.WORKER_STATE_LIVE:
        text.append("  lost: its pool is void\n", "red")
        return text
    _append_counts(text, pool)
    ref_counts = struct.unpack(f"<{len(pool.states)}I", pool.ref_counts)
    _append_map(text, pool.states, list(map(_block, pool.states, ref_counts)), size)
    if pool.host_states:
        text.append(pool.worker, "bold")
        _append_host_counts(text, pool)
        _append_map(text, pool.host_states, [_LOOKS.get(state, _MOVING) for state in pool.host_states], size)
    return text


def _append_map(text: Text, all_states: bytes, signs: list[tuple[str, str]], size: MapSize) -> None:
    num_cells, per_cell = size.cells_per_row, size.blocks_per_cell(len(all_states))
    for first in range(0, len(all_states), num_cells * per_cell):
        states = all_states[first : first + num_cells * per_cell]
        text.append(f"{first + 1:>6} ", "dim")
        if per_cell == 1:
            _append_cells(text, signs[first : first + num_cells])
        else:
            _append_cells(text, (_cell(states[at : at + per_cell]) for at in range(0, len(states), per_cell)))
            text.append(" " * (num_cells - -(-len(states) // per_cell)) + _percents(states), "dim")
        text.append("\n")
    if per_cell > 1:
        text.append(f"{'':7}{per_cell} blocks a cell; on the right, percent of a row referenced and cached\n", "dim")


def _append_counts(text: Text, pool: pb.PoolBlocks) -> None:
    counts = Counter(pool.states)
    num_hit = counts[pb.BLOCK_STATE_PROTECTED]
    text.append(f"  {len(pool.states):,} blocks: ")
    text.append(f"{counts[pb.BLOCK_STATE_FREE]:,} free, ")
    text.append(f"{counts[pb.BLOCK_STATE_REFERENCED]:,} referenced", "green")
    text.append(f", {counts[pb.BLOCK_STATE_CACHED] + num_hit:,} cached", "blue")
    text.append(f" ({num_hit:,} hit)", "cyan")
    text.append(f", {pool.num_evictions:,} evicted\n")


def _append_host_counts(text: Text, pool: pb.PoolBlocks) -> None:
    counts = Counter(pool.host_states)
    num_hit, num_kept = counts[pb.BLOCK_STATE_PROTECTED], counts[pb.BLOCK_STATE_SET_ASIDE]
    text.append(f"  on the host, {len(pool.host_states):,} blocks: {counts[pb.BLOCK_STATE_FREE]:,} free, ")
    text.append(f"{counts[pb.BLOCK_STATE_REFERENCED]:,} moving", "green")
    text.append(f", {counts[pb.BLOCK_STATE_CACHED] + num_hit:,} cached", "blue")
    text.append(f" ({num_hit:,} hit)", "cyan")
    text.append(f", {num_kept:,} kept for preempted sequences\n", "magenta")


def _append_cells(text: Text, cells: Iterable[tuple[str, str]]) -> None:
    for colour, run in groupby(cells, lambda cell: cell[1]):
        text.append("".join(sign for sign, _ in run), colour)


def _block(state: int, ref_count: int) -> tuple[str, str]:
    """A block's sign and colour."""
    if state == pb.BLOCK_STATE_REFERENCED:
        return "+" if ref_count > 9 else str(ref_count), "green" if ref_count == 1 else "bold yellow"
    return _LOOKS[state]


def _cell(states: bytes) -> tuple[str, str]:
    """The sign and colour of several blocks: the share referenced, else what most of them are."""
    num_referenced = states.count(pb.BLOCK_STATE_REFERENCED)
    if num_referenced:
        return _SHADES[-(-4 * num_referenced // len(states)) - 1], "green"
    return _LOOKS[max(_LOOKS, key=states.count)]


def _percents(states: bytes) -> str:
    num_referenced = states.count(pb.BLOCK_STATE_REFERENCED)
    num_cached = len(states) - num_referenced - states.count(pb.BLOCK_STATE_FREE)
    return f" {100 * num_referenced / len(states):3.0f} {100 * num_cached / len(states):3.0f}"
