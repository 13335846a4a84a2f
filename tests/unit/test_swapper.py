"""Swaps and the two tiers of the prefix cache, operation by operation."""

import pytest

from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.host_pool import HostPool
from scheduler.sequence import Sequence, SequenceLimits, SequenceStatus
from scheduler.swapper import MAX_SWAP_OUTS, Prefix, Swap, Swapper

BLOCK_SIZE = 4
HASHES = [b"%016d" % i for i in range(100)]


def a_swapper(num_blocks: int, num_host_blocks: int) -> Swapper:
    return Swapper(BlockManager(num_blocks, Changes()), HostPool(num_host_blocks), BLOCK_SIZE)


def a_sequence(seq_id: int, num_blocks: int = 0) -> Sequence:
    tokens = [1] * (BLOCK_SIZE * num_blocks + 1)
    sequence = Sequence(seq_id, f"r{seq_id}", 0, tokens, len(tokens), SequenceLimits(8, frozenset(), True), b"")
    sequence.block_hashes = HASHES[:num_blocks]
    return sequence


def run(swapper: Swapper, seq_id: int, hashes: list[bytes]) -> Sequence:
    """A sequence takes in what there is of `hashes`, and computes the rest."""
    sequence = a_sequence(seq_id, len(hashes))
    sequence.block_hashes = list(hashes)
    found = swapper.find_prefix(hashes)
    sequence.block_ids = swapper.reserve(sequence, found, len(hashes) - len(found))
    sequence.status = SequenceStatus.RUNNING
    for block_id, hash_ in list(zip(sequence.block_ids, hashes, strict=True))[len(found) :]:
        swapper._blocks.publish(block_id, hash_)
    sequence.num_computed_tokens = BLOCK_SIZE * len(hashes)
    return sequence


def end(swapper: Swapper, sequence: Sequence) -> None:
    swapper._blocks.release(sequence.seq_id, sequence.block_ids)
    sequence.block_ids = []
    sequence.status = SequenceStatus.FINISHED


def check(swapper: Swapper, *sequences: Sequence) -> None:
    swapper._blocks.check([s.block_ids for s in sequences], swapper.held_block_ids)
    swapper.check()


def send_out(swapper: Swapper, *hashes: bytes) -> None:
    """To the end."""
    for hash_ in hashes:
        swapper.begin_out(swapper._blocks.block_of(hash_))
    swapper.finish([swap.host_block_id for swap in swapper.started], [])
    swapper.started.clear()


def evict_all(swapper: Swapper) -> None:
    """Another content takes every block, and leaves none of it."""
    blocks = swapper._blocks
    blocks.release(999, blocks.reserve(999, [], blocks.num_available_blocks))


def test_what_went_out_and_was_evicted_is_found_on_the_host() -> None:
    swapper = a_swapper(6, 4)
    end(swapper, run(swapper, 1, HASHES[:3]))
    send_out(swapper, *HASHES[:2])
    assert swapper.find_prefix(HASHES[:3]) == Prefix([1, 2, 3]), "the device comes first"
    evict_all(swapper)
    assert swapper.find_prefix(HASHES[:3]) == Prefix([0, 0], {0: 1, 1: 2})
    check(swapper)


def test_a_prefix_may_alternate_between_the_tiers() -> None:
    swapper = a_swapper(4, 4)
    end(swapper, run(swapper, 1, HASHES[:4]))
    send_out(swapper, HASHES[0], HASHES[2])
    evict_all(swapper)
    second = run(swapper, 2, HASHES[1:2])
    end(swapper, second)
    found = swapper.find_prefix(HASHES[:4])
    assert found == Prefix([0, swapper._blocks.block_of(HASHES[1]), 0], {0: 1, 2: 2})
    sequence = a_sequence(3, 4)
    sequence.block_ids = swapper.reserve(sequence, found, 1)
    assert sequence.block_ids[1] == found.block_ids[1]
    assert sequence.num_arriving_blocks == 2
    rows = swapper._blocks.changes.reserve[-2:]
    assert [(len(shared), len(new)) for _, shared, new in rows] == [(0, 1), (1, 2)], "rows that name them in order"
    check(swapper, sequence)


def test_who_waits_for_blocks_runs_when_the_last_one_is_there() -> None:
    swapper = a_swapper(6, 4)
    end(swapper, run(swapper, 1, HASHES[:3]))
    send_out(swapper, *HASHES[:3])
    evict_all(swapper)
    swapper.started.clear()
    second = run(swapper, 2, HASHES[:3])
    assert (second.num_arriving_blocks, len(swapper.started)) == (3, 3)
    assert [swap.is_out for swap in swapper.started] == [False] * 3
    assert all(swapper.is_arriving(hash_) for hash_ in HASHES[:3])
    assert swapper.find_prefix(HASHES[:3]) == Prefix(), "neither published yet, nor to be copied in once more"
    swapper.finish([], second.block_ids[:2])
    assert second.num_arriving_blocks == 1
    assert swapper.find_prefix(HASHES[:3]) == Prefix(second.block_ids[:2])
    swapper.finish([], second.block_ids[2:])
    assert second.num_arriving_blocks == 0
    check(swapper, second)


def test_blocks_that_come_in_for_nobody_any_more_are_hits_for_others() -> None:
    swapper = a_swapper(6, 4)
    end(swapper, run(swapper, 1, HASHES[:2]))
    send_out(swapper, *HASHES[:2])
    evict_all(swapper)
    second = run(swapper, 2, HASHES[:2])
    block_ids = list(second.block_ids)
    end(swapper, second)
    assert swapper._blocks.num_available_blocks == 4, "held until they are there"
    second.attempt, second.status, second.num_arriving_blocks = 1, SequenceStatus.RUNNING, 0
    swapper.finish([], block_ids)
    assert second.num_arriving_blocks == 0, "its next attempt does not wait for the first one's blocks"
    assert swapper.find_prefix(HASHES[:2]) == Prefix(block_ids)
    check(swapper)


def test_a_block_on_its_way_out_keeps_its_place_and_is_not_reused() -> None:
    swapper = a_swapper(3, 3)
    for i in range(3):
        end(swapper, run(swapper, i, HASHES[i : i + 1]))
    coldest = list(swapper._blocks.coldest_first())
    swapper.begin_out(coldest[0])
    assert list(swapper._blocks.coldest_first()) == coldest[1:]
    assert swapper._blocks.reserve(9, [], 1) == coldest[1:2], "the next one goes instead"
    swapper.finish([1], [])
    assert list(swapper._blocks.coldest_first()) == [coldest[0], coldest[2]], "it is the coldest again"


def test_a_table_may_come_and_go_while_its_block_goes_out() -> None:
    swapper = a_swapper(3, 3)
    end(swapper, run(swapper, 1, HASHES[:1]))
    swapper.begin_out(1)
    second = run(swapper, 2, HASHES[:1])
    assert swapper.num_tables(1) == 1
    check(swapper, second)
    swapper.finish([1], [])
    check(swapper, second)
    end(swapper, second)
    check(swapper)
    assert swapper.find_prefix(HASHES[:1]) == Prefix([1])


def test_what_the_host_has_evicted_is_not_sent_again_from_the_same_block() -> None:
    swapper = a_swapper(4, 1)
    end(swapper, run(swapper, 1, HASHES[:2]))
    send_out(swapper, HASHES[0])
    assert not swapper.can_go_out(1), "it is there"
    send_out(swapper, HASHES[1])
    assert swapper.is_missing(HASHES[0])
    assert not swapper.can_go_out(1)
    evict_all(swapper)
    again = run(swapper, 2, HASHES[:1])
    assert swapper.can_go_out(again.block_ids[0]) == (again.block_ids[0] != 1), "another block, another life"


def test_no_more_goes_out_than_the_host_can_take() -> None:
    swapper = a_swapper(8, 2)
    end(swapper, run(swapper, 1, HASHES[:4]))
    swapper.begin_out(1)
    assert swapper.num_outs_left == 1
    swapper.begin_out(2)
    assert swapper.num_outs_left == 0
    many = a_swapper(200, 200)
    assert many.num_outs_left == MAX_SWAP_OUTS


def test_what_is_set_aside_outlives_all_others_until_its_sequence_is_back() -> None:
    swapper = a_swapper(8, 3)
    victim = run(swapper, 1, HASHES[:2])
    send_out(swapper, HASHES[0])
    swapper.begin_out(victim.block_ids[1])  # on its way when it is preempted
    swapper.set_aside(victim)
    end(swapper, victim)
    swapper.finish([swapper.started.pop().host_block_id], [])
    others = run(swapper, 2, HASHES[10:14])
    for hash_ in HASHES[10:14]:
        send_out(swapper, hash_)
    assert [swapper.host.block_of(h) > 0 for h in (*HASHES[:2], *HASHES[10:14])] == [True] * 2 + [False] * 3 + [True]
    check(swapper, others)
    back = run(swapper, 1, HASHES[:2])
    for hash_ in HASHES[20:22]:
        end(swapper, run(swapper, 3, [hash_]))
        send_out(swapper, hash_)
    assert not swapper.host.block_of(HASHES[0]), "no longer kept"
    check(swapper, others, back)


def test_who_never_comes_back_lets_go_of_what_was_set_aside() -> None:
    swapper = a_swapper(4, 1)
    victim = run(swapper, 1, HASHES[:1])
    send_out(swapper, HASHES[0])
    swapper.set_aside(victim)
    assert swapper.num_outs_left == 0
    swapper.give_up(victim)
    assert swapper.num_outs_left == 1
    swapper.give_up(victim)
    check(swapper, victim)


def test_hits_that_do_not_pay_are_none() -> None:
    swapper = a_swapper(2, 2)
    end(swapper, run(swapper, 1, HASHES[:1]))
    send_out(swapper, HASHES[0])
    evict_all(swapper)
    swapper.takes_hits = False
    assert (swapper.find_prefix(HASHES[:1]), swapper.is_known(HASHES[0])) == (Prefix(), False)
    swapper.takes_hits = True
    assert (swapper.find_prefix(HASHES[:1]), swapper.is_known(HASHES[0])) == (Prefix([0], {0: 1}), True)


def test_a_content_computed_while_it_comes_in_stays_where_it_was_published() -> None:
    swapper = a_swapper(4, 2)
    end(swapper, run(swapper, 1, HASHES[:1]))
    send_out(swapper, HASHES[0])
    evict_all(swapper)
    waiting = run(swapper, 2, HASHES[:1])
    other = a_sequence(3, 1)
    other.block_ids = swapper._blocks.reserve(3, [], 1)
    assert swapper._blocks.publish(other.block_ids[0], HASHES[0])
    swapper.finish([], waiting.block_ids)
    assert swapper.find_prefix(HASHES[:1]) == Prefix(other.block_ids)
    check(swapper, waiting, other)


def test_a_swap_that_was_never_begun_cannot_end() -> None:
    swapper = a_swapper(2, 2)
    for outs, ins in (([1], []), ([], [1])):
        with pytest.raises(KeyError):
            swapper.finish(outs, ins)


def test_a_new_owner_issues_every_swap_again_and_knows_who_waits() -> None:
    swapper = a_swapper(8, 4)
    end(swapper, run(swapper, 1, HASHES[:2]))
    send_out(swapper, *HASHES[:2])
    evict_all(swapper)
    waiting = run(swapper, 2, HASHES[:2])
    running = run(swapper, 3, HASHES[5:6])
    swapper.begin_out(running.block_ids[0])
    image = swapper.image()

    blocks = BlockManager.from_image(swapper._blocks.image(), Changes())
    heir = Swapper(blocks, HostPool.from_image(image), BLOCK_SIZE)
    swaps = heir.adopt(image)
    (host_block_id,) = image.swap_outs
    ins = [Swap(False, block_id, 1 + i) for i, block_id in enumerate(waiting.block_ids)]
    assert swaps == [Swap(True, running.block_ids[0], host_block_id), *ins]
    assert heir.image() == image
    waiting.num_arriving_blocks = 0
    heir.adopt_running(waiting)
    assert waiting.num_arriving_blocks == 2
    check(heir, waiting, running)
    heir.finish([host_block_id], waiting.block_ids)
    assert waiting.num_arriving_blocks == 0
    assert heir.find_prefix(HASHES[:2]) == Prefix(waiting.block_ids)
    check(heir, waiting, running)
