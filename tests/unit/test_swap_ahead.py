"""What goes out ahead of need, and what does not."""

import pytest

from scheduler.admitter import PlannerLimits
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.host_pool import HostPool
from scheduler.planner import Planner
from scheduler.swap_ahead import WINDOW_BLOCKS, Preemption, SwapAhead, SwapCosts
from scheduler.swapper import MAX_SWAP_OUTS, Swapper
from tests.unit.planner_sim import Arrival, SimLimits, Simulation
from tests.unit.traffic import BLOCK_SIZE, NUM_AT_ONCE, Pool, prompts

FAST = SwapCosts(block_bytes=100, bytes_per_s=1e6, s_per_token=1e-3, step_s=0.02)
SLOW = SwapCosts(block_bytes=100, bytes_per_s=1e3, s_per_token=1e-3, step_s=0.02)


class HostedPool(Pool):
    """A pool with a host pool, whose swaps are done at once, before the next step."""

    def __init__(self, num_blocks: int, num_host_blocks: int, costs: SwapCosts, preemption: Preemption) -> None:
        self._make = (num_host_blocks, costs, preemption)
        super().__init__(num_blocks)

    def _planner(self) -> Planner:
        num_host_blocks, costs, preemption = self._make
        swapper = Swapper(self.blocks, HostPool(num_host_blocks), BLOCK_SIZE)
        limits = PlannerLimits(BLOCK_SIZE, NUM_AT_ONCE, 4096, 1.0)
        return Planner(limits, self.blocks, SwapAhead(self.blocks, swapper, preemption, costs))

    def _reserve(self) -> None:
        super()._reserve()
        swapper = self.planner.swapper
        started, swapper.started = swapper.started, []
        outs, ins = [s.host_block_id for s in started if s.is_out], [s.block_id for s in started if not s.is_out]
        swapper.finish(outs, ins)


def test_a_set_of_prompts_larger_than_the_pool_is_hit_on_the_host() -> None:
    """Ten prompts of eight blocks, in turns, in a pool of forty: without a host each is gone before it comes back."""
    hot = prompts(1, 10, 8)
    bare, hosted = Pool(40), HostedPool(40, 100, FAST, Preemption.AUTO)
    for pool in (bare, hosted):
        pool.serve(hot)
    assert max(bare.serve(hot)) == 0.0
    assert min(hosted.serve(hot)) > 0.99 - 1 / 129
    counters = hosted.planner.counters
    assert counters.num_host_hit_tokens == counters.num_prefix_hit_tokens >= 10 * 8 * BLOCK_SIZE


def test_hits_that_take_longer_than_computing_are_not_taken() -> None:
    hot = prompts(1, 10, 8)
    pool = HostedPool(40, 100, SLOW, Preemption.AUTO)
    for _ in range(2):
        pool.serve(hot)
    assert pool.planner.counters.num_host_hit_tokens == 0
    assert pool.planner.swapper.num_blocks_out == 0, "nor sent out"
    forced = HostedPool(40, 100, SLOW, Preemption.SWAP)
    for _ in range(2):
        forced.serve(hot)
    assert forced.planner.counters.num_host_hit_tokens > 0


def test_speeds_that_are_learnt_decide() -> None:
    pool = HostedPool(8, 8, SwapCosts(block_bytes=100), Preemption.AUTO)
    swap_ahead = pool.planner.swap_ahead
    assert not swap_ahead.swapper.takes_hits, "nothing is known"
    swap_ahead.learn(step_s=0.01, s_per_token=1e-3)
    assert not swap_ahead.swapper.takes_hits
    swap_ahead.learn_moves(10, 1e-3)
    assert swap_ahead.swapper.takes_hits, "a block in 1 ms, against 16 ms"
    for _ in range(100):
        swap_ahead.learn_moves(1, 1.0)
    assert not swap_ahead.swapper.takes_hits


def test_an_idle_pool_comes_to_rest() -> None:
    """However many cached blocks a small host pool cannot hold."""
    pool = HostedPool(60, 5, FAST, Preemption.SWAP)
    pool.serve(prompts(1, 12, 4))
    for _ in range(60):
        pool._reserve()
    num_blocks_out = pool.planner.swapper.num_blocks_out
    for _ in range(20):
        pool._reserve()
    assert pool.planner.swapper.num_blocks_out == num_blocks_out


def test_cached_blocks_go_out_only_when_few_are_free_and_never_more_than_half() -> None:
    blocks = BlockManager(300, Changes())
    swapper = Swapper(blocks, HostPool(300), BLOCK_SIZE)
    ahead = SwapAhead(blocks, swapper, Preemption.AUTO, FAST)
    table = blocks.reserve(1, [], 300 - WINDOW_BLOCKS)
    for block_id in table:
        blocks.publish(block_id, b"%016d" % block_id)
    blocks.release(1, table)
    ahead.send_out([], 2)
    assert swapper.started == []
    blocks.reserve(2, [], 3)
    ahead.send_out([], 2)
    assert [swap.block_id for swap in swapper.started] == table[::-1][: len(swapper.started)], "the coldest first"
    assert len(swapper.started) == min(MAX_SWAP_OUTS, WINDOW_BLOCKS)

    small = BlockManager(10, Changes())
    swapper = Swapper(small, HostPool(300), BLOCK_SIZE)
    table = small.reserve(1, [], 10)
    for block_id in table:
        small.publish(block_id, b"%016d" % block_id)
    small.release(1, table)
    SwapAhead(small, swapper, Preemption.AUTO, FAST).send_out([], 2)
    assert len(swapper.started) == 5


@pytest.mark.parametrize("preemption", list(Preemption))
def test_preempted_sequences_come_back_by_swap_or_are_computed_again(preemption: Preemption) -> None:
    """Eight sequences of 40 tokens and more in a pool for three, all admitted for want of foresight."""
    arrivals = [Arrival((i + 1,) * 20, 40, ignores_eos=True) for i in range(8)]
    limits = SimLimits(
        num_blocks=36, overcommit=100.0, max_num_batched_tokens=64, num_host_blocks=200, preemption=preemption
    )
    simulation = Simulation(limits, arrivals).run()
    num_again = sum(
        len(added.token_ids) - added.num_computed_tokens
        for round_ in simulation.rounds
        for plan, _ in round_.plans
        for added in plan.added
        if added.attempt
    )
    swapper, counters = simulation.planner.swapper, simulation.planner.counters
    print(f"{preemption.value}: {counters.num_preemptions} preempted, {num_again} tokens again,", end=" ")
    print(f"{swapper.num_blocks_out} blocks out, {swapper.num_blocks_in} in")
    assert counters.num_preemptions > 5
    if preemption is Preemption.RECOMPUTE:
        assert (swapper.num_blocks_in, num_again > 100) == (0, True)
    else:
        assert swapper.num_blocks_in > 20
        assert num_again < 5 * counters.num_preemptions * limits.block_size, "mostly the last, partial block"
