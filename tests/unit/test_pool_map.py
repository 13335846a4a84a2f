"""What `pagoda blocks` and `pagoda explain` show, without a service."""

import struct

import pytest
from pagoda.v1 import generation_pb2 as pb
from rich.console import Console

from deploy.blocks import frame
from deploy.explain import lines_of
from deploy.pool_map import LEGEND, SHADED_LEGEND, MapSize, draw_pool

FREE, REFERENCED, CACHED, PROTECTED = b"\x01", b"\x02", b"\x03", b"\x04"
SIZE = MapSize(80, 16)


def pool(states: bytes, ref_counts: dict[int, int] | None = None) -> pb.PoolBlocks:
    """A live worker's; blocks that are referenced have one table unless `ref_counts` says more."""
    counts = [(ref_counts or {}).get(i, 1) if state == REFERENCED[0] else 0 for i, state in enumerate(states)]
    return pb.PoolBlocks(
        worker="worker-0",
        state=pb.WORKER_STATE_LIVE,
        states=states,
        ref_counts=struct.pack(f"<{len(states)}I", *counts),
        num_evictions=1234,
    )


def drawn(pool: pb.PoolBlocks, size: MapSize = SIZE) -> list[str]:
    """The lines of a pool."""
    return draw_pool(pool, size).plain.splitlines()


def test_a_small_pool_shows_every_block() -> None:
    states = FREE * 3 + CACHED * 2 + PROTECTED + REFERENCED * 4 + FREE * 60
    head, first, second = drawn(pool(states, {7: 2, 8: 9, 9: 10}))
    assert head == "worker-0  70 blocks: 63 free, 4 referenced, 3 cached (1 hit), 1,234 evicted"
    assert first == "     1 ···--=129+" + "·" * 54
    assert second == "    65 ······"


@pytest.mark.parametrize("num_blocks", [1, 64, 1024, 1025, 9999, 100_000, 900_000])
@pytest.mark.parametrize("width", [20, 80, 100, 200])
def test_a_pool_of_any_size_fits(num_blocks: int, width: int) -> None:
    size = MapSize(width, 16)
    _, *rows = drawn(pool(CACHED * num_blocks), size)
    per_cell = size.blocks_per_cell(num_blocks)
    cells = [row[7:].split(" ")[0] for row in rows]
    num_rows = len(rows) - (per_cell > 1)
    assert num_rows <= 16
    assert per_cell == 1 or num_rows > 16 // 2.6, "no larger cells than are needed"
    assert sum(map(len, cells[:num_rows])) == -(-num_blocks // per_cell)
    assert set("".join(cells[:num_rows])) == {"-"}
    assert all(len(row) <= max(width, 31) for row in rows[:num_rows])


def test_a_large_pool_shows_shares() -> None:
    states = FREE * 20_000 + CACHED * 10_000 + PROTECTED * 10_000 + REFERENCED * 10_000 + FREE * 50_000
    mixed = bytearray(states)
    for i in range(20_000, 30_000, 4):  # a quarter of each cell is named by tables
        mixed[i] = REFERENCED[0]
    head, *rows, foot = drawn(pool(bytes(mixed)))
    assert "70,000 free, 12,500 referenced, 17,500 cached (10,000 hit)" in head
    assert foot == "       100 blocks a cell; on the right, percent of a row referenced and cached"
    cells = "".join(row[7:71] for row in rows).rstrip()
    assert cells == "·" * 200 + "░" * 100 + "=" * 100 + "█" * 100 + "·" * 500
    assert rows[0].endswith("   0   0")
    assert rows[4].endswith("  17  83"), "blocks 25,601 to 32,000: 1,100 of 6,400"


def test_a_lost_worker_has_no_pool() -> None:
    lost = pb.PoolBlocks(worker="worker-1", state=pb.WORKER_STATE_LOST)
    assert drawn(lost) == ["worker-1  lost: its pool is void"]


def text_of(pools: pb.GetBlocksResponse, note: str = "") -> str:
    """A frame, as a file gets it."""
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(pools, SIZE, note))
    return capture.get()


def test_a_frame_explains_the_signs_that_it_shows() -> None:
    small, large = pool(FREE * 9), pool(FREE * 9999)
    assert LEGEND in text_of(pb.GetBlocksResponse(pools=[small]))
    assert SHADED_LEGEND not in text_of(pb.GetBlocksResponse(pools=[small]))
    both = text_of(pb.GetBlocksResponse(pools=[small, large]), "a word")
    assert LEGEND in both
    assert SHADED_LEGEND in both
    assert both.rstrip().endswith("a word")
    assert text_of(pb.GetBlocksResponse()) == "no workers\n"


def test_the_legends_fit_a_terminal() -> None:
    assert max(len(LEGEND), len(SHADED_LEGEND)) <= 80


def explained(**fields: object) -> list[str]:
    """The lines of an explanation."""
    return list(lines_of(pb.ExplainResponse(request_id="mine", block_size=16, **fields)))  # type: ignore[arg-type]


def test_an_explanation_says_it_in_stretches() -> None:
    runs = [pb.EvictedRun(first_block=2, num_blocks=2, evicted_at_s=90.0, evicted_for="thief")]
    admission = pb.Admission(
        worker="worker-0", admitted_at_s=100.5, sources=bytes([1, 1, 3, 3, 3, 2, 4]), evicted_runs=runs
    )
    again = pb.Admission(worker="worker-1", admitted_at_s=101.0, attempt=2, sources=bytes([2, 2, 2, 2, 2, 2, 4]))
    head, first, *stretches, second, rest, last = explained(num_prompt_tokens=100, admissions=[admission, again])
    assert head == "mine: a prompt of 100 tokens in 7 blocks of 16"
    assert first.endswith(" on worker-0: 2 of 7 blocks hit")
    clock = stretches[1].split()[11]
    assert [" ".join(line.split()) for line in stretches] == [
        "blocks 0-1 tokens 0-31 hit on the device",
        f"blocks 2-3 tokens 32-63 computed again: evicted 10.5 s before, at {clock} for thief",
        "block 4 tokens 64-79 computed again: evicted",
        "block 5 tokens 80-95 computed",
        "block 6 tokens 96-99 computed: the last token is always run",
    ]
    assert "admitted again, attempt 3, at" in second
    assert " ".join(rest.split()) == "blocks 0-5 tokens 0-95 computed"
    assert "tokens 96-99" in last


def test_who_was_never_admitted_has_no_blocks_to_explain() -> None:
    assert explained(num_prompt_tokens=3)[1:] == ["it waits for its admission"]
    assert explained(num_prompt_tokens=3, has_ended=True)[1:] == ["it ended before it was admitted"]
