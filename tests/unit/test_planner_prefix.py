"""Prefix hits, single flight and eviction, as the planner decides them."""

import pytest

from scheduler.block_hash import extend_chain, root_hash
from scheduler.sequence import SequenceStatus
from tests.unit.planner_sim import Arrival, SimLimits, Simulation

BLOCK = 4
ROOMY = SimLimits(num_blocks=64, block_size=BLOCK)


def num_prefill_tokens(simulation: Simulation) -> int:
    """Tokens that all plans ran, the decodes' left out."""
    rows = [row for round_ in simulation.rounds for _, plan_rows in round_.plans for row in plan_rows]
    return sum(row.num_tokens for row in rows) - sum(
        live.sequence.num_output_tokens - 1 for live in simulation.live.values()
    )


def chain(prompt: tuple[int, ...], salt: str = "") -> list[bytes]:
    """The hashes of a prompt's full blocks."""
    hashes: list[bytes] = []
    extend_chain(root_hash("model", "float32", "", salt), hashes, prompt, BLOCK)
    return hashes


def test_many_sequences_with_one_prefix_compute_it_once() -> None:
    """64 requests at once, 1,024 tokens of prefix and one of their own."""
    prefix = tuple(1 + i % 7 for i in range(1024))
    limits = SimLimits(2048, 16, max_num_seqs=64, max_num_batched_tokens=256)
    arrivals = [Arrival((*prefix, 10 + i), 3, ignores_eos=True) for i in range(64)]
    simulation = Simulation(limits, arrivals).run()
    assert num_prefill_tokens(simulation) == 1024 + 64
    assert simulation.planner.counters.num_prefix_hit_tokens == 63 * 1024
    assert simulation.planner.counters.num_preemptions == 0


def test_the_same_prefix_twice_in_one_step() -> None:
    """Two equal prompts that arrive together: the second waits for what the first one computes."""
    simulation = Simulation(ROOMY, [Arrival((1,) * 12, 4, ignores_eos=True)] * 2)
    simulation.step()
    assert simulation.sequence(1).status is SequenceStatus.RUNNING
    assert simulation.sequence(2).status is SequenceStatus.WAITING
    simulation.run()
    assert num_prefill_tokens(simulation) == 12 + 4, "the last block is run again, for its last token's logits"


def test_a_follower_starts_as_soon_as_its_prefix_is_there_and_not_when_the_leader_is_done() -> None:
    leader = Arrival((1,) * 8 + (2,) * 40, 40, ignores_eos=True)
    follower = Arrival((1,) * 8 + (3,), 2, ignores_eos=True)
    simulation = Simulation(SimLimits(64, BLOCK, max_num_batched_tokens=8), [leader, follower]).run()
    assert [live.sequence.seq_id for live in simulation.committer.ended] == [2, 1]
    assert simulation.sequence(2).num_cached_tokens == 8


@pytest.mark.parametrize("round_number", range(1, 8))
def test_a_cancelled_leader_hands_its_prefix_over(round_number: int) -> None:
    prompt = (1,) * 40
    limits = SimLimits(64, BLOCK, max_num_batched_tokens=8)
    arrivals = [Arrival(prompt, 4, cancel_round=round_number), *[Arrival((*prompt, 2), 4)] * 3]
    simulation = Simulation(limits, arrivals).run()
    assert num_prefill_tokens(simulation) <= 48 + 16 * 3


def test_a_preempted_leader_hands_its_prefix_over() -> None:
    """A shortage takes the leader's blocks; a follower of higher priority computes the prefix instead."""
    leader = Arrival((1,) * 24, 4, priority=1, ignores_eos=True)
    follower = Arrival((1,) * 24 + (2,), 4, round=3, priority=0, ignores_eos=True)
    limits = SimLimits(12, BLOCK, max_num_batched_tokens=4)
    simulation = Simulation(limits, [leader, follower])
    simulation.until(lambda: simulation.sequence(1).num_computed_tokens >= 8)
    assert simulation.sequence(2).status is SequenceStatus.WAITING
    simulation.planner._preempt(simulation.sequence(1))
    simulation.until(lambda: simulation.sequence(2).status is SequenceStatus.RUNNING)
    assert simulation.sequence(1).status is SequenceStatus.PREEMPTED
    simulation.run()


@pytest.mark.parametrize("num_blocks_of_prompt", [1, 2, 5])
def test_a_prompt_of_exactly_some_blocks_with_a_full_hit_runs_its_last_block(num_blocks_of_prompt: int) -> None:
    prompt = (1,) * (num_blocks_of_prompt * BLOCK)
    simulation = Simulation(ROOMY, [Arrival(prompt, 3), Arrival(prompt, 3, round=20)]).run()
    assert simulation.sequence(1).num_cached_tokens == 0
    assert simulation.sequence(2).num_cached_tokens == (num_blocks_of_prompt - 1) * BLOCK


@pytest.mark.parametrize("num_tokens", range(1, 14))
def test_hits_are_whole_blocks_and_leave_a_token_to_run(num_tokens: int) -> None:
    first = Arrival((1,) * 13, 2)
    simulation = Simulation(ROOMY, [first, Arrival((1,) * num_tokens, 2, round=20)]).run()
    assert simulation.sequence(2).num_cached_tokens == (num_tokens - 1) // BLOCK * BLOCK


def test_generated_blocks_are_hits_for_who_goes_on_from_them() -> None:
    """A conversation: the next prompt holds the first one and its answer."""
    first = Arrival((1,) * 8, 9, ignores_eos=True)
    answer = tuple(Simulation(ROOMY, [first]).expected_output(1))
    second = Arrival((1,) * 8 + answer + (2,), 2, round=30)
    simulation = Simulation(ROOMY, [first, second]).run()
    assert simulation.sequence(2).num_cached_tokens == 16, "8 of the prompt, 8 of the answer; its ninth never ran"


def test_a_hit_after_preemption_goes_on_from_its_own_blocks() -> None:
    """Index errors after preemption with a prefix hit: the table begins with what it had published before."""
    simulation = Simulation(ROOMY, [Arrival((1,) * 10, 20, ignores_eos=True)])
    simulation.until(lambda: simulation.sequence(1).num_computed_tokens >= 15)
    sequence = simulation.sequence(1)
    published = sequence.block_ids[:3]
    simulation.planner._preempt(sequence)
    simulation.until(lambda: sequence.status is SequenceStatus.RUNNING)
    assert sequence.block_ids[:3] == published
    assert sequence.attempt == 1
    simulation.run()
    assert sequence.num_cached_tokens == 0, "what a client is told is the first admission's"


def test_a_result_in_flight_is_not_applied_to_the_next_life_of_a_preempted_sequence() -> None:
    """Its tokens count, its progress does not; it is not admitted again before every plan that names it is back."""
    simulation = Simulation(ROOMY, [Arrival((1,) * 10, 20, ignores_eos=True)])
    simulation.until(lambda: simulation.sequence(1).num_output_tokens == 2)
    simulation.step()
    sequence = simulation.sequence(1)
    assert sequence.num_plans_in_flight > 0
    num_tokens = len(sequence.token_ids)
    simulation.planner._preempt(sequence)
    while sequence.num_plans_in_flight:
        assert sequence.status is SequenceStatus.PREEMPTED
        assert sequence.num_computed_tokens == 0
        simulation.step()
    assert len(sequence.token_ids) > num_tokens
    simulation.run()


def test_partial_blocks_are_never_published_nor_kept() -> None:
    """They go to the free queue, not through the cache, where they would push real entries out."""
    prompts = [(5 + i,) * (4 + i) for i in range(4)]
    simulation = Simulation(ROOMY, [Arrival(prompt, 2, ignores_eos=True) for prompt in prompts]).run()
    full = {hash_ for prompt in prompts for hash_ in chain(prompt)}
    generated = 1  # the third prompt's second block is filled by the first token that it generates
    hashes = set(simulation.blocks.image().hashes.values())
    assert full <= hashes
    assert simulation.blocks.num_cached_blocks == len(full) + generated
    assert simulation.blocks.num_free_blocks == 64 - len(full) - generated


def test_nothing_is_published_before_the_worker_has_reported_it() -> None:
    """Not at reservation, nor when it is planned: two chunks are in flight, and only what came back is in the index."""
    simulation = Simulation(SimLimits(64, BLOCK, max_num_batched_tokens=8), [Arrival((1,) * 40, 2)])
    hashes = chain((1,) * 40)
    while not simulation.committer.ended:
        simulation.step()
        num_published = len(simulation.blocks.find_prefix(hashes))
        assert num_published == min(10, simulation.sequence(1).num_computed_tokens // BLOCK)
        assert simulation.sequence(1).num_planned_tokens <= 8 * num_published + 16
    simulation.run()


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    limits = SimLimits(8, BLOCK)
    simulation = Simulation(limits, [Arrival((1,) * 16, 1), Arrival((2,) * 23, 1, round=10)]).run()
    assert len(simulation.blocks.find_prefix(chain((1,) * 16))) == 2, "six blocks were needed, four were free"


def test_blocks_of_another_salt_are_no_hits() -> None:
    arrivals = [
        Arrival((1,) * 9, 2, salt="a"),
        Arrival((1,) * 9, 2, salt="b", round=20),
        Arrival((1,) * 9, 2, round=40),
    ]
    simulation = Simulation(ROOMY, arrivals).run()
    assert [simulation.sequence(i).num_cached_tokens for i in (1, 2, 3)] == [0, 0, 0]
    assert len(set(chain((1,) * 9, "a") + chain((1,) * 9, "b") + chain((1,) * 9))) == 6


def test_a_follower_is_counted_as_uncached_only_for_what_nobody_computes() -> None:
    simulation = Simulation(ROOMY, [Arrival((1,) * 40, 2)])
    simulation.step()
    hashes = chain((1,) * 40 + (2,) * 8)
    assert simulation.planner._admitter.outlook(hashes, []).num_promised == 40
    assert simulation.planner._admitter.outlook(chain((2,) * 8), []).num_promised == 0
