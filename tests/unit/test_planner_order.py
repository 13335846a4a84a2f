"""Who runs when: budgets, chunks, priority, fairness, and what happens when blocks run out."""

import pytest

from scheduler.sequence import SequenceStatus
from tests.unit.planner_sim import Arrival, SimLimits, Simulation

BLOCK = 4


def counts_by_plan(simulation: Simulation) -> list[dict[int, int]]:
    """Per plan: tokens by sequence."""
    return [
        {row.sequence.seq_id: row.num_tokens for row in rows}
        for round_ in simulation.rounds
        for _, rows in round_.plans
    ]


def test_a_long_prompt_is_chunked_beside_decodes_that_never_wait() -> None:
    limits = SimLimits(64, BLOCK, max_num_batched_tokens=8)
    talkers = [Arrival((1 + i,) * 3, 40, ignores_eos=True) for i in range(3)]
    simulation = Simulation(limits, [*talkers, Arrival((9,) * 50, 4, round=10, ignores_eos=True)]).run()
    plans = counts_by_plan(simulation)
    mixed = [plan for plan in plans if plan.get(4, 0) > 1]
    assert [plan[4] for plan in mixed] == [5] * 10, "what the three decodes leave of the budget"
    assert all(plan.get(seq_id) == 1 for plan in mixed for seq_id in (1, 2, 3))


def test_decodes_go_first_whatever_the_order_in_which_a_new_owner_found_them() -> None:
    """Adopted sequences come in no order: a long prompt may stand before those that talk."""
    limits = SimLimits(64, BLOCK, max_num_batched_tokens=8)
    talkers = [Arrival((1 + i,) * 3, 30, ignores_eos=True) for i in range(3)]
    simulation = Simulation(limits, [*talkers, Arrival((9,) * 50, 4, round=6, ignores_eos=True)])
    simulation.until(lambda: len(simulation.planner.running) == 4)
    simulation.planner.running.reverse()
    simulation.run()
    mixed = [plan for plan in counts_by_plan(simulation) if plan.get(4, 0) > 1]
    assert all(plan.get(seq_id) == 1 for plan in mixed for seq_id in (1, 2, 3))


def test_a_prompt_is_admitted_only_with_room_for_all_of_it() -> None:
    """Chunked admission without that check: two half-done prompts that wait for each other's blocks."""
    limits = SimLimits(20, BLOCK, max_num_batched_tokens=8, overcommit=100.0)
    simulation = Simulation(limits, [Arrival((i,) * 48, 8, ignores_eos=True) for i in (1, 2, 3)])
    while len(simulation.committer.ended) < 3:
        simulation.step()
        for sequence in simulation.planner.running:
            assert len(sequence.block_ids) * BLOCK >= 48
    assert simulation.planner.counters.num_preemptions == 0


def test_half_done_prefills_don_t_pin_all_blocks() -> None:
    """Prompts are admitted as fast as the budget works them off, not as fast as they arrive."""
    limits = SimLimits(1000, BLOCK, max_num_seqs=100, max_num_batched_tokens=16)
    simulation = Simulation(limits, [Arrival((1 + i,) * 64, 2, ignores_eos=True) for i in range(30)])
    while len(simulation.committer.ended) < 30:
        simulation.step()
        half_done = [s for s in simulation.planner.running if 0 < s.num_unplanned_tokens > 1]
        assert len(half_done) <= 2
    simulation.run()


def test_blocks_freed_by_a_preemption_help_the_very_step_that_needed_them() -> None:
    """Deferred frees that never help the step that needs them are a deadlock."""
    limits = SimLimits(8, BLOCK, overcommit=100.0, lookahead=2)
    arrivals = [Arrival((i,) * 8, 17, ignores_eos=True) for i in (1, 2)]
    simulation = Simulation(limits, arrivals)
    simulation.until(lambda: simulation.planner.counters.num_preemptions > 0)
    changes = simulation.rounds[-1].changes
    assert changes.release == [2], "the last by arrival"
    assert [seq_id for seq_id, _, _ in changes.reserve] == [1]
    simulation.run()


@pytest.mark.parametrize("overcommit", [1.0, 3.0])
def test_the_last_by_priority_and_arrival_is_preempted(overcommit: float) -> None:
    limits = SimLimits(12, BLOCK, overcommit=100.0)
    priorities = {1: 0, 2: 1, 3: 0}
    arrivals = [Arrival((i,) * 8, 17, priority=p, ignores_eos=True) for i, p in priorities.items()]
    simulation = Simulation(limits, arrivals)
    simulation.until(lambda: simulation.planner.counters.num_preemptions > 0)
    assert simulation.sequence(2).status is SequenceStatus.PREEMPTED
    simulation.run()
    assert [seq_id for seq_id, live in simulation.live.items() if live.sequence.num_preemptions] in ([2], [2, 3])


def test_looking_ahead_makes_preemption_rare() -> None:
    """The peak that the batch can reach, against admitting whatever fits now."""

    def num_preemptions(overcommit: float) -> int:
        limits = SimLimits(60, BLOCK, max_num_seqs=32, max_num_batched_tokens=64, overcommit=overcommit)
        arrivals = [Arrival((i % 250 + 1,) * (4 + i % 9), 40, ignores_eos=True, round=i // 2) for i in range(80)]
        return Simulation(limits, arrivals).run().planner.counters.num_preemptions

    assert num_preemptions(1.0) == 0, "with known lengths there is nothing to be wrong about"
    assert num_preemptions(3.0) > 20


def test_looking_ahead_learns_how_long_outputs_are() -> None:
    """Limits far above what is generated: once some have ended, as many run at once as if their ends were known."""
    limits = SimLimits(100, BLOCK, max_num_seqs=64, max_num_batched_tokens=64)

    def run(max_tokens: int) -> tuple[int, int]:
        arrivals = [Arrival((i % 250 + 1,) * 6, max_tokens, stops_after=8 + i % 5) for i in range(150)]
        simulation = Simulation(limits, arrivals)
        simulation.until(lambda: len(simulation.committer.ended) >= 20)
        first = simulation.round_number
        simulation.run()
        return simulation.round_number - first, simulation.planner.counters.num_preemptions

    num_rounds, num_preemptions = run(300)
    assert num_rounds < 1.5 * run(13)[0]
    assert num_preemptions <= 3


def test_a_long_sequence_is_admitted_in_spite_of_smaller_later_ones() -> None:
    """It fits the pool only alone; those that come later don't pass it."""
    limits = SimLimits(16, BLOCK, max_num_seqs=8)
    arrivals = [Arrival((1 + i % 250,) * 5, 6, round=i, ignores_eos=True) for i in range(60)]
    arrivals.insert(5, Arrival((251,) * 56, 8, round=5, ignores_eos=True))
    simulation = Simulation(limits, arrivals)
    simulation.until(lambda: simulation.round_number > 6 and simulation.sequence(6).num_output_tokens > 0)
    assert simulation.round_number < 40
    simulation.run()


def test_a_cancelled_head_of_the_queue_lets_the_next_ones_in_at_once() -> None:
    """What was refused is gone: those behind it are looked at again, though no block has moved."""
    limits = SimLimits(16, 16, max_num_batched_tokens=64)
    talker = Arrival((1,) * 17, 100, ignores_eos=True)
    arrivals = [talker, Arrival((2,) * 200, 40, round=4, cancel_round=8), Arrival((3,) * 5, 4, round=5)]
    simulation = Simulation(limits, arrivals)
    simulation.until(lambda: simulation.round_number == 8)
    assert simulation.sequence(3).status is SequenceStatus.WAITING
    simulation.step()
    assert simulation.sequence(3).status is SequenceStatus.RUNNING
    simulation.run()


def test_lower_numbers_of_priority_go_first() -> None:
    limits = SimLimits(64, BLOCK, max_num_seqs=1)
    priorities = [0, 5, -3, 0, 5, -3]
    arrivals = [Arrival((1 + i,) * 4, 2, priority=p) for i, p in enumerate(priorities)]
    simulation = Simulation(limits, arrivals).run()
    assert simulation.admitted_order == [3, 6, 1, 4, 2, 5]


def test_tenants_take_turns_by_the_tokens_that_they_were_served() -> None:
    """One asks for ten times as much and first: the other does not wait for it."""
    limits = SimLimits(64, BLOCK, max_num_seqs=1, max_num_batched_tokens=64)
    greedy = [Arrival((1 + i,) * 8, 8, tenant="greedy", ignores_eos=True) for i in range(20)]
    modest = [Arrival((101 + i,) * 8, 8, tenant="modest", ignores_eos=True, round=3) for i in range(4)]
    simulation = Simulation(limits, [*greedy, *modest]).run()
    tenants = [simulation.arrivals[seq_id - 1].tenant for seq_id in simulation.admitted_order]
    assert tenants[:10].count("modest") == 4


def test_a_preempted_sequence_goes_before_later_arrivals_of_its_tenant() -> None:
    limits = SimLimits(8, BLOCK, max_num_seqs=4, overcommit=100.0)
    arrivals = [Arrival((i,) * 8, 17, ignores_eos=True, round=max(0, 3 * (i - 2))) for i in range(1, 6)]
    simulation = Simulation(limits, arrivals).run()
    assert simulation.planner.counters.num_preemptions > 0
    ends = [live.sequence.seq_id for live in simulation.committer.ended]
    assert ends == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("ack_rounds", [0, 1, 2, 5])
def test_reservations_run_ahead_of_redis_so_that_plans_never_wait(ack_rounds: int) -> None:
    """With a lookahead of as many plans as Redis is away, no round is without a plan once the first has left."""
    limits = SimLimits(64, BLOCK, lookahead=ack_rounds + 2, ack_rounds=ack_rounds)
    simulation = Simulation(limits, [Arrival((1,) * 4, 60, ignores_eos=True)]).run()
    planned = [round_.number for round_ in simulation.rounds if round_.plans]
    assert planned == list(range(planned[0], planned[-1] + 1))
    assert planned[0] == max(1, ack_rounds)


def test_a_sequence_that_ends_in_its_first_step_leaves_nothing() -> None:
    simulation = Simulation(SimLimits(8, BLOCK), [Arrival((1,) * 4, 1), Arrival((2,) * 3, 9, stops_after=0)]).run()
    assert simulation.blocks.num_free_blocks == 7
    assert simulation.blocks.num_cached_blocks == 1
