"""Plans and results as columns: what is built is what a worker reads back, and only changes are sent."""

import numpy as np
import pytest
from pagoda.v1 import worker_pb2 as pb

from scheduler.block_manager import BlockCopy
from scheduler.request import SamplingParams
from scheduler.sequence import Sequence, SequenceLimits
from scheduler.step_rows import ScheduledRow
from scheduler.wire import ResultRow, StepNumbers, StepWork, build_plan, choice_seed, result_rows, sampler_params
from worker.rng import draw

NUMBERS = StepNumbers(epoch=3, step_id=7, committed_step_id=5)


def running(seq_id: int, num_prompt_tokens: int, num_planned: int, blocks: tuple[list[int], int]) -> Sequence:
    """A sequence whose plans, the one to be built included, cover `num_planned`; `blocks` = (ids, acknowledged)."""
    limits = SequenceLimits(8, frozenset((2, 0)), ignores_eos=False)
    tokens = list(range(100, 100 + num_prompt_tokens))
    sequence = Sequence(seq_id, f"r{seq_id}", 1, tokens, num_prompt_tokens, limits, b"")
    sequence.block_ids, sequence.num_acked_blocks = blocks
    sequence.num_planned_tokens = num_planned
    return sequence


def row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
    return ScheduledRow(sequence, sequence.attempt, num_tokens, num_samples=0)


SAMPLERS = {i: pb.SamplerParams(seed=i) for i in range(10)}


def test_a_sequence_is_added_once_with_all_that_the_worker_needs() -> None:
    sequence = running(4, 20, 16, ([5, 6, 7], 2))
    sequence.attempt, sequence.num_computed_tokens = 2, 8
    plan = build_plan(NUMBERS, StepWork([row(sequence, 8)], [BlockCopy(3, 4, 5)], [9, 11]), SAMPLERS)
    assert (plan.epoch, plan.step_id, plan.committed_step_id) == (3, 7, 5)
    assert list(plan.removed_seq_ids) == [9, 11]
    assert (plan.copy_src_block_ids, plan.copy_dst_block_ids, plan.copy_num_tokens) == ([3], [4], [5])
    assert list(plan.scheduled_seq_ids) == [4]
    assert list(plan.num_scheduled_tokens) == [8]
    (added,) = plan.added
    assert (added.seq_id, added.attempt, added.num_prompt_tokens) == (4, 2, 20)
    assert added.num_computed_tokens == 8, "where this plan begins"
    assert list(added.token_ids) == sequence.token_ids[8:]
    assert list(added.block_ids) == [5, 6], "a block that Redis has not acknowledged is not named"
    assert list(added.num_blocks) == [2]
    assert added.sampler == SAMPLERS[4]
    assert (sequence.is_on_worker, sequence.num_sent_blocks) == (True, 2)


def test_a_sequence_that_joins_for_several_steps_begins_before_the_first() -> None:
    sequence = running(4, 20, 23, ([5, 6, 7], 2))
    plan = build_plan(NUMBERS, StepWork([row(sequence, 3)], num_steps=3), SAMPLERS)
    assert (plan.num_steps, list(plan.num_scheduled_tokens)) == (3, [3])
    assert plan.added[0].num_computed_tokens == 20


def test_later_plans_carry_only_what_changed() -> None:
    same, grown = running(1, 20, 20, ([1, 2], 2)), running(2, 20, 20, ([3, 4], 2))
    build_plan(NUMBERS, StepWork([row(same, 1), row(grown, 1)]), SAMPLERS)
    grown.block_ids, grown.num_acked_blocks = [3, 4, 5, 6, 7], 4
    plan = build_plan(NUMBERS, StepWork([row(same, 1), row(grown, 1)]), SAMPLERS)
    assert list(plan.added) == []
    assert list(plan.appended_seq_ids) == [2]
    assert list(plan.appended_num_blocks) == [2]
    assert list(plan.appended_block_ids) == [5, 6]
    again = build_plan(NUMBERS, StepWork([row(same, 1), row(grown, 1)]), SAMPLERS)
    assert list(again.appended_seq_ids) == []
    assert list(again.scheduled_seq_ids) == [1, 2]


def test_columns_of_several_sequences_stay_apart() -> None:
    sequences = [running(i, 16, 16, ([10 * i], 1)) for i in range(1, 5)]
    build_plan(NUMBERS, StepWork([row(s, 1) for s in sequences]), SAMPLERS)
    for sequence in sequences[1:]:
        sequence.block_ids = [10 * sequence.seq_id + i for i in range(sequence.seq_id)]
        sequence.num_acked_blocks = sequence.seq_id
    plan = pb.StepPlan.FromString(
        build_plan(NUMBERS, StepWork([row(s, 1) for s in sequences]), SAMPLERS).SerializeToString()
    )
    assert list(plan.appended_seq_ids) == [2, 3, 4]
    assert list(plan.appended_num_blocks) == [1, 2, 3]
    assert list(plan.appended_block_ids) == [21, 31, 32, 41, 42, 43]


def test_results_describe_themselves() -> None:
    result = pb.StepResult(
        seq_ids=[1, 2, 3, 4],
        attempts=[0, 1, 0, 5],
        num_computed_tokens=[7, 16, 9, 1],
        first_output_indexes=[0, 4, 2, 0],
        num_tokens=[0, 1, 3, 1],
        token_ids=[10, 20, 21, 22, 30],
    )
    assert result_rows(pb.StepResult.FromString(result.SerializeToString())) == [
        ResultRow(1, 0, 7, 0, [], []),
        ResultRow(2, 1, 16, 4, [10], []),
        ResultRow(3, 0, 9, 2, [20, 21, 22], []),
        ResultRow(4, 5, 1, 0, [30], []),
    ]
    result.token_logprobs.extend([0.0, -0.5, -1.0, -2.0, 0.0])
    assert [row.logprobs for row in result_rows(result)] == [[], [0.0], [-0.5, -1.0, -2.0], [0.0]]
    result.attempts.pop()
    with pytest.raises(ValueError):
        result_rows(result)


def test_seeds_of_choices_differ_fit_a_word_and_begin_with_the_request_s_own() -> None:
    seeds = [choice_seed(2**64 - 1, choice) for choice in range(100)]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len({choice_seed(seed, choice) for seed in range(50) for choice in range(50)}) == 2500


def test_no_choice_has_the_random_numbers_of_another() -> None:
    """Not even moved on by some places, as where a seed grew by what the generator adds from one index to the next."""
    indexes = np.arange(1000)
    seeds = [np.full(1000, choice_seed(7, choice), np.uint64) for choice in range(64)]
    drawn = [set(draw(seed, indexes).tolist()) for seed in seeds]
    assert len(set.union(*drawn)) == 64 * 1000


def test_the_worker_s_share_of_the_parameters() -> None:
    sequence = running(1, 4, 4, ([1], 1))
    params = SamplingParams(0.5, 7, 0.25, 0.125, 9, 8, 3, ignore_eos=False, stop_token_ids=(), stop=())
    found = sampler_params(sequence, params)
    assert found == pb.SamplerParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        seed=choice_seed(9, 1),
        min_tokens=3,
        end_token_ids=[0, 2],
    )
    sequence.logprobs = []
    assert sampler_params(sequence, params).reports_logprobs
