"""The order of eviction: what must hold of the policy alone, and of chains in a pool, whatever is asked for."""

import os
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise, product
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.eviction import PROTECTED_PER_PROBATION, EvictionQueue
from scheduler.sequence import BlockSource
from tests.unit.traffic import Pool, prompts

IS_LONG = os.environ.get("PAGODA_TEST_LONG") == "1"
MANY = settings(max_examples=2000 if IS_LONG else 300, deadline=None)
NUM_BLOCKS = 12
NUM_REMEMBERED = 5
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "take", "touch", "evict"]), st.integers(0, NUM_BLOCKS - 1)), max_size=60
)


def protected(queue: EvictionQueue) -> list[int]:
    """The cached blocks that go last, in the order in which they go."""
    return [block_id for block_id in queue if queue.is_protected(block_id)]


def hash_of(block_id: int) -> bytes:
    """A block's content, the same each time."""
    return b"content %d" % block_id


@MANY
@given(OPERATIONS)
def test_every_cached_block_waits_once_and_leaves_once(operations: list[tuple[str, int]]) -> None:
    """Against the plainest model there is: whom the queue protects, whom it evicts, and whom it knows again."""
    queue = EvictionQueue(NUM_REMEMBERED)
    cached: OrderedDict[int, bool] = OrderedDict()  # block -> whether it is protected, in order of arrival
    asked: set[int] = set()  # published blocks that a second request asked for
    evicted: dict[int, bool] = {}  # block -> whether it was asked for since
    held: set[int] = set()  # published blocks that some table names
    for name, block_id in operations:
        if name == "add" and block_id not in cached:
            if block_id not in held:
                queue.publish(block_id, hash_of(block_id))
                asked |= {block_id} if evicted.pop(block_id, False) else set()
            held.discard(block_id)
            queue.add(block_id, hash_of(block_id))
            cached[block_id] = block_id in asked
        elif name == "take" and block_id in cached:
            queue.remove(block_id)
            held.add(block_id)
            del cached[block_id]
        elif name == "touch" and block_id in held | cached.keys():
            queue.touch(block_id)
            asked.add(block_id)
        elif name == "touch":
            queue.touch_evicted(hash_of(block_id))
            evicted |= {block_id: True} if block_id in evicted else {}
        elif name == "evict" and cached:
            if sum(cached.values()) > PROTECTED_PER_PROBATION * (len(cached) - sum(cached.values())):
                oldest = next(b for b, is_protected in cached.items() if is_protected)
                cached[oldest] = False
                cached.move_to_end(oldest)
                asked.remove(oldest)
            victim = next(b for b, is_protected in cached.items() if not is_protected)
            assert queue.evict() == (victim, hash_of(victim))
            del cached[victim]
            asked.discard(victim)
            evicted[victim] = False
            for forgotten in list(evicted)[:-NUM_REMEMBERED]:
                del evicted[forgotten]
        assert protected(queue) == [b for b, is_protected in cached.items() if is_protected]
        assert sorted(queue) == sorted(cached)
        assert len(queue) == len(cached)
        assert all((b in queue) == (b in cached) for b in range(NUM_BLOCKS))


@MANY
@given(st.lists(st.integers(0, 9), max_size=40))
def test_where_nothing_is_asked_for_twice_it_is_plain_lru(uses: list[int]) -> None:
    queue, order = EvictionQueue(0), OrderedDict[int, None]()
    for block_id in uses:
        if block_id in order:
            queue.remove(block_id)
        queue.add(block_id, hash_of(block_id))
        order[block_id] = None
        order.move_to_end(block_id)
    assert [queue.evict()[0] for _ in range(len(queue))] == list(order)


def test_a_block_that_was_evicted_and_is_asked_for_again_is_protected() -> None:
    queue = EvictionQueue(2)
    for block_id in (1, 2, 3):
        queue.add(block_id, hash_of(block_id))
    assert [queue.evict()[0] for _ in range(3)] == [1, 2, 3]
    for block_id in (1, 2):
        queue.touch_evicted(hash_of(block_id))
    for block_id in (1, 2, 3):
        queue.publish(block_id, hash_of(block_id))
        queue.add(block_id, hash_of(block_id))
    assert protected(queue) == [2], "1 is forgotten, 3 was not asked for"


def test_a_block_out_of_the_protected_share_has_to_be_asked_for_again() -> None:
    queue = EvictionQueue(0)
    for block_id in range(9):
        queue.touch(block_id)
        queue.add(block_id, hash_of(block_id))
    queue.add(9, hash_of(9))
    queue.add(10, hash_of(10))
    assert queue.evict()[0] == 9
    assert 0 not in protected(queue), "nine are more than four times two"
    queue.remove(0)
    queue.add(0, hash_of(0))
    assert 0 not in protected(queue)


CHAINS = [path for length in (2, 3, 5) for path in product((0, 1), repeat=length)]
events: Counter[str] = Counter()


@dataclass(eq=False, slots=True)
class Reader:
    """A sequence: its chain, and the blocks that it holds."""

    chain: list[bytes]
    table: list[int] = field(default_factory=list)
    num_published: int = 0
    has_asked: bool = False


class Forest:
    """Sequences of a tree of chains in a pool that holds a third of it: hits, misses, preemptions, ends."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.blocks = BlockManager(20, Changes())
        self.readers: list[Reader] = []
        self.parents: dict[bytes, bytes] = {}
        self.num_one_offs = 0

    def _reader(self, path: tuple[int, ...]) -> Reader:
        chain = [repr(path[: i + 1]).encode() for i in range(len(path))]
        self.parents.update(pairwise(reversed(chain)))
        return Reader(chain)

    def arrive(self) -> None:
        """A request for a chain that others ask for too."""
        self._admit(self._reader(self.rng.choice(CHAINS)))

    def arrive_once(self) -> None:
        """A request for what nobody else asks for."""
        self.num_one_offs += 1
        self._admit(self._reader((1 + self.num_one_offs,) * self.rng.randint(1, 6)))

    def _admit(self, reader: Reader) -> None:
        shared = self.blocks.find_prefix(reader.chain)
        rest = reader.chain[len(shared) :]
        others = {hash_ for r in self.readers for hash_ in r.chain[r.num_published :]}
        fits = len(rest) <= self.blocks.num_available_blocks - self.blocks.num_cached_among(shared)
        if not fits or others & set(rest):
            return  # single flight: another one computes it
        if not reader.has_asked:
            self.blocks.touch(reader.chain)
        reader.has_asked = True
        events["evictions"] += max(0, len(rest) - self.blocks.num_free_blocks)
        events["hits"] += len(shared)
        reader.table = self.blocks.reserve(id(reader), shared, len(rest))
        reader.num_published = len(shared)
        self.readers.append(reader)

    def compute(self) -> None:
        """Some more of a sequence is filled."""
        if self.readers:
            reader = self.rng.choice(self.readers)
            for i in range(reader.num_published, min(reader.num_published + self.rng.randint(1, 6), len(reader.chain))):
                assert self.blocks.publish(reader.table[i], reader.chain[i])
                reader.num_published = i + 1

    def end(self) -> None:
        """A sequence ends, or comes back for what it has asked for before."""
        if self.readers:
            reader = self.readers.pop(self.rng.randrange(len(self.readers)))
            self.blocks.release(id(reader), reader.table)
            self.blocks.changes.take()
            if self.rng.random() < 0.3:
                self._admit(reader)

    def check(self) -> None:
        """No chain has a hole: what is published can be found from its chain's front."""
        self.blocks.check(r.table for r in self.readers)
        published = set(self.blocks.image().hashes.values())
        for hash_ in published:
            assert self.parents.get(hash_, hash_) in published, f"{hash_!r} has lost what is before it"
        events["steps with protected blocks"] += bool(protected(self.blocks._cached))


def test_a_chain_never_loses_a_block_that_a_longer_one_needs() -> None:
    events.clear()

    @settings(max_examples=300 if IS_LONG else 30, deadline=None)
    @given(st.integers(0, 2**32))
    def runs(seed: int) -> None:
        forest = Forest(seed)
        for _ in range(200):
            forest.rng.choice((forest.arrive, forest.arrive_once, forest.compute, forest.compute, forest.end))()
            forest.check()

    runs()
    print(f"\n{dict(events)}")
    assert min(events[name] for name in ("evictions", "hits", "steps with protected blocks")) > 1000, "not tested"


def counts(pool: Pool) -> tuple[int, int]:
    """Cached blocks: all, and those protected."""
    return pool.blocks.num_cached_blocks, len(protected(pool.blocks._cached))


def test_one_request_alone_protects_nothing_whatever_befalls_it() -> None:
    """In chunks, preempted in the middle of its prompt, and admitted again to what it has published itself."""
    pool = Pool(64, max_num_batched_tokens=64)
    sequence = pool.open(prompts(1, 1, 40)[0])
    for num_steps in (3, 5):
        for _ in range(num_steps):
            pool.step()
        pool.planner._preempt(sequence)
        pool.planner.removed.clear()
    pool.finish()
    assert sequence.num_preemptions == 2
    assert [admission.sources.count(BlockSource.HIT) for admission in sequence.admissions] == [0, 12, 32]
    assert counts(pool) == (40, 0)


def test_one_request_that_computes_again_what_was_evicted_from_it_protects_nothing() -> None:
    pool = Pool(64)
    sequence = pool.open(prompts(1, 1, 40)[0])
    pool.step()
    pool.planner._preempt(sequence)
    pool.planner.waiting.remove(sequence)
    pool.serve(prompts(10, 1, 60))
    pool.planner.waiting.push(sequence)
    pool.finish()
    assert sequence.admissions[1].sources.count(BlockSource.EVICTED) > 30
    assert counts(pool)[1] == 0


def test_the_choices_of_one_request_protect_nothing() -> None:
    """Neither those that fork, nor those that find no room to and are admitted to the prompt's blocks later."""
    pool = Pool(64, max_num_seqs=2)
    pool.open([1] * 65, num_choices=5)
    pool.finish()
    assert pool.planner.counters.num_prefix_hit_tokens >= 64
    assert counts(pool) == (4, 0)


def test_a_second_request_protects_what_it_shares() -> None:
    pool = Pool(64)
    first, second = [1] * 65, [1] * 33 + [2] * 32
    pool.serve([first])
    assert counts(pool) == (4, 0)
    pool.serve([second])
    assert counts(pool) == (6, 2)
    pool.serve([first])
    assert counts(pool) == (6, 4)
