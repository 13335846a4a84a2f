"""Pins: what they hold, how much, and when they let go."""

import pytest

from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.pins import PIN_BIT, Pin, Pins, unpack_pin
from scheduler.sequence import Sequence, SequenceLimits
from tests.unit.planner_sim import Arrival, SimLimits, Simulation

HASHES = [b"%016d" % i for i in range(20)]


def published(blocks: BlockManager, seq_id: int, hashes: list[bytes], pin_s: float = 10.0) -> Sequence:
    """A sequence whose blocks are all computed."""
    limits = SequenceLimits(1, frozenset(), True)
    sequence = Sequence(seq_id, f"r{seq_id}", 0, [1], 1, limits, b"", block_hashes=hashes, pin_s=pin_s)
    shared = blocks.find_prefix(hashes)
    sequence.block_ids = blocks.reserve(seq_id, shared, len(hashes) - len(shared))
    for block_id, hash_ in zip(sequence.block_ids, hashes, strict=True):
        blocks.publish(block_id, hash_)
    return sequence


def pin(pins: Pins, sequence: Sequence, now_s: float = 0.0) -> None:
    pins.promise(sequence, len(sequence.block_hashes))
    pins.pin(sequence, len(sequence.block_hashes), now_s)


def test_a_pin_outlives_its_sequence_and_every_eviction() -> None:
    blocks = BlockManager(8, Changes())
    pins = Pins(blocks, 4)
    sequence = published(blocks, 1, HASHES[:3])
    pin(pins, sequence)
    blocks.release(1, sequence.block_ids)
    assert blocks.num_available_blocks == 5
    blocks.release(2, blocks.reserve(2, [], 5))
    assert blocks.find_prefix(HASHES[:3]) == sequence.block_ids
    blocks.changes.take()
    pins.expire(9.9)
    assert blocks.num_available_blocks == 5
    pins.expire(10.0)
    assert blocks.num_available_blocks == 8
    assert blocks.changes.pin == [(1 | PIN_BIT, b"")]
    assert blocks.changes.release == [1 | PIN_BIT]
    blocks.check([])


def test_the_budget_counts_each_block_once_and_promises_too() -> None:
    blocks = BlockManager(20, Changes())
    pins = Pins(blocks, 5)
    first, second = published(blocks, 1, HASHES[:3]), published(blocks, 2, HASHES[:4])
    pin(pins, first)
    assert (pins.num_blocks, pins.num_blocks_left) == (3, 2)
    pins.promise(second, 2)
    assert pins.num_blocks_left == 0
    pins.take_back(second)
    assert pins.num_blocks_left == 2
    pin(pins, second)
    assert len(pins.pinned[2 | PIN_BIT].block_ids) == 2, "as far as the budget goes"
    assert (pins.num_blocks, pins.num_blocks_left) == (3, 2)


def test_what_was_not_promised_is_not_pinned() -> None:
    blocks = BlockManager(20, Changes())
    pins = Pins(blocks, 5)
    sequence = published(blocks, 1, HASHES[:3])
    pins.pin(sequence, 3, 0.0)
    assert pins.pinned == {}
    assert blocks.changes.pin == []


def test_a_pin_of_the_script_to_come_is_not_let_go_in_it() -> None:
    """Within a script releases come before reservations: Redis would refuse it."""
    blocks = BlockManager(8, Changes())
    pins = Pins(blocks, 4)
    pin(pins, published(blocks, 1, HASHES[:2]))
    assert pins.end("r1") == 2
    pins.expire(1e9)
    assert not pins.give_way()
    assert len(pins.pinned) == 1
    blocks.changes.take()
    pins.expire(0.0)
    assert pins.pinned == {}
    assert pins.end("r1") == 0


def test_the_one_that_would_expire_first_gives_way() -> None:
    blocks = BlockManager(8, Changes())
    pins = Pins(blocks, 8)
    for seq_id, seconds in ((1, 30.0), (2, 10.0), (3, 20.0)):
        pin(pins, published(blocks, seq_id, HASHES[seq_id : seq_id + 1], seconds))
    assert pins.next_expiry_s == 10.0
    blocks.changes.take()
    assert pins.give_way()
    assert [pin.request_id for pin in pins.pinned.values()] == ["r1", "r3"]


def test_a_pin_is_read_back_as_it_was_written() -> None:
    found = Pin("request ü", 1234.5, (3, 1))
    assert unpack_pin(found.pack(), [3, 1]) == found


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_scan_evicts_all_but_what_is_pinned(is_pinned: bool) -> None:
    hot = Arrival((1,) * 16, 1, pin_rounds=10_000.0 if is_pinned else 0.0, ignores_eos=True)
    scan = [Arrival((10 + i,) * 16, 1, round=5 * i + 5, ignores_eos=True) for i in range(20)]
    again = Arrival((1,) * 17, 1, round=120, ignores_eos=True)
    simulation = Simulation(SimLimits(num_blocks=20, max_pinned_blocks=4), [hot, *scan, again])
    simulation.until(lambda: len(simulation.committer.ended) == 22)
    assert simulation.sequence(22).num_cached_tokens == (16 if is_pinned else 0)


def test_pins_give_way_to_a_request_that_could_not_run_beside_them() -> None:
    """A pool of ten blocks, eight of them pinned; a request that needs nine."""
    pinned = [Arrival((i + 1,) * 16, 1, pin_rounds=1e6, ignores_eos=True) for i in range(2)]
    large = Arrival((9,) * 30, 6, round=30, ignores_eos=True)
    simulation = Simulation(SimLimits(num_blocks=10, max_pinned_blocks=8, max_num_batched_tokens=64), [*pinned, large])
    simulation.until(lambda: len(simulation.committer.ended) == 2)
    assert simulation.planner.pins.num_blocks == 8
    simulation.until(lambda: len(simulation.committer.ended) == 3)
    assert len(simulation.planner.pins.pinned) == 0
