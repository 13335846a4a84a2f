"""What the cache keeps of hot prompts while one-off prompts stream through it, beside plain LRU; `-s` prints it."""

import random
from collections.abc import Callable
from statistics import fmean

import pytest

from scheduler.eviction import EvictionQueue
from tests.unit.traffic import Pool, Prompt, prompts

NUM_BLOCKS = 1000
HOT = prompts(1, 50, 8)
"""400 blocks that are asked for again and again."""
OTHER_HOT = prompts(100, 50, 8)
ONE_OFF_BLOCKS = 20
NUM_ONE_OFFS = 10 * NUM_BLOCKS // ONE_OFF_BLOCKS
Queue = Callable[[int], EvictionQueue]


class Lru(EvictionQueue):
    """Plain LRU: who asks, and how often, is all the same."""

    def touch(self, block_id: int) -> None:
        """Counts for nothing."""

    def touch_evicted(self, hash_: bytes) -> None:
        """Counts for nothing."""


class Forgetful(EvictionQueue):
    """Segmented LRU alone, without a memory of what was evicted."""

    def __init__(self, num_remembered: int) -> None:
        super().__init__(0)


def pool(queue: Queue) -> Pool:
    """Empty, with this order of eviction."""
    pool = Pool(NUM_BLOCKS)
    pool.blocks._cached = queue(NUM_BLOCKS)
    return pool


def one_offs(count: int) -> list[Prompt]:
    """Nobody asks for these twice."""
    return prompts(10_000, count, ONE_OFF_BLOCKS)


def hit_rate(pool: Pool, hot: list[Prompt], others: list[Prompt], num_rounds: int) -> float:
    """Of the hot prompts, all of them in each round, in another order, the others spread evenly among them."""
    rng = random.Random(5)
    mixed: list[tuple[bool, Prompt]] = []
    for _ in range(num_rounds):
        mixed += [(True, prompt) for prompt in rng.sample(hot, len(hot))]
    every = max(1, len(mixed) // max(1, len(others)))
    for i, prompt in enumerate(others):
        mixed.insert((i + 1) * every + i, (False, prompt))
    shares = pool.serve([prompt for _, prompt in mixed])
    return fmean(share for share, (is_hot, _) in zip(shares, mixed, strict=True) if is_hot)


def among_a_scan(queue: Queue) -> tuple[float, float]:
    """Before, and while one-off prompts of ten pools come, one of 20 blocks with each hot one of 8."""
    served = pool(queue)
    served.serve(HOT)
    before = hit_rate(served, HOT, [], 2)
    return before, hit_rate(served, HOT, one_offs(NUM_ONE_OFFS), NUM_ONE_OFFS // len(HOT))


def after_a_scan(queue: Queue) -> tuple[float, float]:
    """Before and after ten pools of nothing but one-off prompts."""
    served = pool(queue)
    served.serve(HOT)
    before = hit_rate(served, HOT, [], 2)
    served.serve(one_offs(NUM_ONE_OFFS))
    return before, hit_rate(served, HOT, [], 1)


def when_others_are_hot(queue: Queue) -> tuple[float, float]:
    """90 prompts of 720 blocks, then 90 others in their place, always in the same order: the last of three rounds."""
    served = pool(queue)
    for _ in range(3):
        before = fmean(served.serve(prompts(1, 90, 8)))
    for _ in range(3):
        after = fmean(served.serve(prompts(1000, 90, 8)))
    return before, after


def after_a_restart(queue: Queue) -> tuple[float, float]:
    """Before, and in the second half of a scan during which another scheduler rebuilds the mirror from Redis."""
    served = pool(queue)
    served.serve(HOT)
    before = hit_rate(served, HOT, [], 2)
    served.rebuild()
    served.blocks._cached = relaid(served, queue)
    scan = one_offs(NUM_ONE_OFFS)
    hit_rate(served, HOT, scan[: NUM_ONE_OFFS // 2], NUM_ONE_OFFS // 2 // len(HOT))
    return before, hit_rate(served, HOT, scan[NUM_ONE_OFFS // 2 :], NUM_ONE_OFFS // 2 // len(HOT))


def relaid(served: Pool, queue: Queue) -> EvictionQueue:
    """What a rebuilt mirror has cached, in the order that it begins with, under another policy."""
    laid, hashes = queue(NUM_BLOCKS), served.blocks.image().hashes
    for block_id in served.blocks._cached:
        laid.add(block_id, hashes[block_id])
    return laid


SCENARIOS = (among_a_scan, after_a_scan, when_others_are_hot, after_a_restart)


@pytest.fixture(scope="module")
def rates() -> dict[str, dict[str, tuple[float, float]]]:
    """By scenario and policy; printed."""
    queues = {"ours": EvictionQueue, "without memory": Forgetful, "LRU": Lru}
    found = {s.__name__: {name: s(queue) for name, queue in queues.items()} for s in SCENARIOS}
    print(f"\nhit rate of hot prompts, before -> after{'':12}", *(f"{name:>18}" for name in queues))
    for scenario, by_queue in found.items():
        print(f"{scenario:52}", *(f"{before:8.1%} -> {after:6.1%}" for before, after in by_queue.values()))
    return found


@pytest.mark.parametrize("scenario", ["among_a_scan", "after_a_scan"])
def test_hot_prompts_hold_out_against_a_scan_of_ten_pools(
    rates: dict[str, dict[str, tuple[float, float]]], scenario: str
) -> None:
    before, after = rates[scenario]["ours"]
    assert before > 0.99
    assert before - after < 0.05
    assert rates[scenario]["LRU"][1] < 0.5, "plain LRU holds out as well: this is no scan"


def test_what_is_hot_no_more_gives_way(rates: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Alone, segmented LRU would serve the new prompts from the fifth of the pool that the old ones leave, for ever."""
    assert rates["when_others_are_hot"]["ours"][1] > 0.99
    assert rates["when_others_are_hot"]["without memory"][1] < 0.2, "the memory is not needed"


def test_a_rebuilt_mirror_learns_again_what_is_hot(rates: dict[str, dict[str, tuple[float, float]]]) -> None:
    before, after = rates["after_a_restart"]["ours"]
    assert before - after < 0.05
