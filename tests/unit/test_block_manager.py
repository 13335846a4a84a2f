"""The mirror by itself; with Redis, and through faults, it is tested in tests/redis."""

import pytest

from scheduler.block_manager import BlockManager, PoolImage
from scheduler.changes import Changes

HASHES = [bytes([i]) * 16 for i in range(1, 30)]


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(8, Changes())


def counts(blocks: BlockManager) -> tuple[int, int, int]:
    """Free, referenced, cached; asserts that they are all."""
    found = (blocks.num_free_blocks, blocks.num_referenced_blocks, blocks.num_cached_blocks)
    assert sum(found) == blocks.num_blocks
    return found


def published(blocks: BlockManager, seq_id: int, num_blocks: int, first_hash: int = 0) -> list[int]:
    """A table whose blocks are all in the index."""
    table = blocks.reserve(seq_id, (), num_blocks)
    for i, block_id in enumerate(table):
        assert blocks.publish(block_id, HASHES[first_hash + i])
    return table


def test_every_block_is_free_referenced_or_cached(blocks: BlockManager) -> None:
    assert counts(blocks) == (8, 0, 0)
    table = blocks.reserve(1, (), 3)
    assert counts(blocks) == (5, 3, 0)
    blocks.publish(table[0], HASHES[0])
    blocks.release(1, table)
    assert counts(blocks) == (7, 0, 1)
    shared = blocks.find_prefix(HASHES[:2])
    assert shared == [table[0]]
    assert blocks.num_cached_among(shared) == 1
    again = blocks.reserve(2, shared, 7)
    assert counts(blocks) == (0, 8, 0)
    blocks.check([again])


def test_the_null_block_is_never_handed_out(blocks: BlockManager) -> None:
    assert sorted(blocks.reserve(1, (), 8)) == list(range(1, 9))


def test_a_reused_block_keeps_no_stale_hash(blocks: BlockManager) -> None:
    blocks.release(1, published(blocks, 1, 8))
    assert blocks.find_prefix(HASHES[:8]) != []
    table = blocks.reserve(2, (), 8)
    assert blocks.find_prefix(HASHES[:8]) == []
    assert blocks.image().hashes == {}
    blocks.release(2, table)
    assert counts(blocks) == (8, 0, 0)


def test_partial_blocks_never_push_published_ones_out(blocks: BlockManager) -> None:
    """Unhashed blocks go back to the free queue; only when it is empty is a cached one evicted."""
    blocks.release(1, published(blocks, 1, 4))
    for seq_id in range(2, 50):
        blocks.release(seq_id, blocks.reserve(seq_id, (), 4))
    assert len(blocks.find_prefix(HASHES[:4])) == 4
    blocks.reserve(99, (), 5)
    assert len(blocks.find_prefix(HASHES[:4])) == 3


def test_the_tail_of_a_table_is_evicted_before_its_head(blocks: BlockManager) -> None:
    blocks.release(1, published(blocks, 1, 8))
    for num_left in range(7, -1, -1):
        blocks.reserve(10 + num_left, (), 1)
        assert len(blocks.find_prefix(HASHES[:8])) == num_left


def test_the_least_recently_used_is_evicted_first_and_a_hit_counts_as_use(blocks: BlockManager) -> None:
    first, second = published(blocks, 1, 2), published(blocks, 2, 2, first_hash=10)
    blocks.release(1, first)
    blocks.release(2, second)
    blocks.release(3, blocks.reserve(3, first, 0))
    blocks.reserve(4, (), 6)
    assert blocks.find_prefix(HASHES[:2]) == first
    assert blocks.find_prefix(HASHES[10:12]) == []


def test_a_shared_block_stays_until_the_last_table_lets_it_go(blocks: BlockManager) -> None:
    table = published(blocks, 1, 2)
    other = blocks.reserve(2, table, 1)
    blocks.release(1, table)
    assert counts(blocks) == (5, 3, 0)
    blocks.check([other])
    blocks.release(2, other)
    assert counts(blocks) == (6, 0, 2)


def test_a_prefix_ends_at_the_first_block_that_is_missing(blocks: BlockManager) -> None:
    table = published(blocks, 1, 1) + published(blocks, 2, 1, first_hash=2)
    assert blocks.find_prefix(HASHES[:3]) == table[:1]
    assert blocks.find_prefix([]) == []


def test_content_that_is_there_already_is_not_published_twice(blocks: BlockManager) -> None:
    table = published(blocks, 1, 1)
    duplicate = blocks.reserve(2, (), 1)
    assert not blocks.publish(duplicate[0], HASHES[0])
    assert blocks.find_prefix(HASHES[:1]) == table
    blocks.release(2, duplicate)
    assert counts(blocks) == (7, 1, 0), "the duplicate is free at once"


def test_what_becomes_free_is_told_once_and_cached_blocks_are_not_free(blocks: BlockManager) -> None:
    table = published(blocks, 1, 1) + blocks.reserve(1, (), 2)
    blocks.release(1, table)
    assert sorted(blocks.freed_block_ids) == table[1:]


def test_a_copy_holds_both_its_blocks_until_it_is_done(blocks: BlockManager) -> None:
    """A child that ends before its copy ran must not let the block go: a new owner would copy into it again."""
    parent = published(blocks, 1, 1) + blocks.reserve(1, (), 1)
    child = blocks.fork(1, 2, parent[:1], (parent[1], 3))
    assert child == [parent[0], child[1]]
    assert blocks.pending_copies == {child[1]: (parent[1], 3)}
    blocks.release(1, parent)
    blocks.release(2, child)
    assert counts(blocks) == (5, 2, 1)
    blocks.check([])
    blocks.finish_copies([child[1]])
    assert counts(blocks) == (7, 0, 1)
    assert blocks.pending_copies == {}


def test_a_fork_without_a_partial_block_copies_nothing(blocks: BlockManager) -> None:
    parent = published(blocks, 1, 2)
    assert blocks.fork(1, 2, parent, None) == parent
    assert blocks.pending_copies == {}
    blocks.check([parent, parent])


def test_every_decision_is_a_row_of_the_next_script(blocks: BlockManager) -> None:
    changes = blocks.changes
    table = blocks.reserve(1, (), 2)
    blocks.publish(table[0], HASHES[0])
    child = blocks.fork(1, 2, table[:1], (table[1], 2))
    blocks.finish_copies([child[1]])
    blocks.reserve(3, table[:1], 1)
    blocks.release(1, table)
    assert changes.reserve == [(1, [], [1, 2]), (3, [(1, HASHES[0])], [4])]
    assert changes.publish == [(1, HASHES[0])]
    assert changes.fork == [(1, 2, 1, 2, 3, 2)]
    assert changes.copied == [3]
    assert changes.release == [1]


def test_a_mirror_is_built_back_from_its_image(blocks: BlockManager) -> None:
    first = published(blocks, 1, 2)
    blocks.release(2, published(blocks, 2, 2, first_hash=5))
    child = blocks.fork(1, 3, first[:1], (first[1], 1))
    rebuilt = BlockManager.from_image(blocks.image(), Changes())
    assert rebuilt.image() == blocks.image()
    assert counts(rebuilt) == counts(blocks)
    rebuilt.check([first, child])
    assert rebuilt.find_prefix(HASHES[5:7]) == blocks.find_prefix(HASHES[5:7])
    empty = BlockManager.from_image(PoolImage(3, {}, {}, {}), Changes())
    assert counts(empty) == (3, 0, 0)


def test_check_notices_what_it_is_for(blocks: BlockManager) -> None:
    table = published(blocks, 1, 2)
    with pytest.raises(AssertionError, match="ref_count differs"):
        blocks.check([])
    with pytest.raises(AssertionError, match="ref_count differs"):
        blocks.check([table, table])
    blocks._free.append(table[0])
    with pytest.raises(AssertionError, match="is in states"):
        blocks.check([table])
