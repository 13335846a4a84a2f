"""The benchmark's own machinery, over a worker that computes nothing: who holds what, and that nobody is favoured."""

import pytest

from scheduler.admitter import PlannerLimits
from tests.load.memory.contenders import CONTENDERS, DENSE_LONGEST, DENSE_POWER, PAGED, PAGED_UNKNOWING, dense
from tests.load.memory.dense import DensePlanner
from tests.load.memory.drive import LOOKAHEAD, Drive, Moment, Request, local_worker
from tests.load.memory.outcome import Outcome
from tests.load.memory.traces import MAX_MODEL_LEN

NUM_BLOCKS = 4 * MAX_MODEL_LEN // 16
LIMITS = PlannerLimits(block_size=16, max_num_seqs=64, max_num_batched_tokens=512, overcommit=1.0)
FLAGS = {"timed-step-s": 0, "num-blocks": NUM_BLOCKS, "max-num-seqs": 64, "max-num-batched-tokens": 512}
REQUESTS = [Request([1] * (3 + 13 * i % 90), 5 + 29 * i % 120, 5 + 29 * i % 120) for i in range(60)]
UNKNOWING = [Request(r.prompt, r.num_output_tokens, MAX_MODEL_LEN - len(r.prompt)) for r in REQUESTS]


def run(name: str, requests: list[Request]) -> tuple[list[Moment], Drive]:
    """All moments of a contender, over a pool of four longest sequences."""
    drive = Drive(CONTENDERS[name](LIMITS, NUM_BLOCKS), local_worker(FLAGS), requests)
    return list(drive), drive


@pytest.mark.parametrize("name", CONTENDERS)
def test_everybody_gets_the_same_tokens_out_of_the_same_memory(name: str) -> None:
    moments, drive = run(name, UNKNOWING if name == PAGED_UNKNOWING else REQUESTS)
    assert [len(output) for output in drive.outputs] == [request.num_output_tokens for request in REQUESTS]
    assert sum(moment.num_output_tokens for moment in moments) == sum(r.num_output_tokens for r in REQUESTS)
    assert {moment.use.whole for moment in moments} == {NUM_BLOCKS * 16}
    assert all(min(m.use.tokens, m.use.internal, m.use.reserved, m.use.external, m.use.free) >= 0 for m in moments)
    assert moments[-1].num_held >= 1
    assert not moments[-1].is_waited_for


def test_where_4_dense_requests_fit_20_paged_ones_do() -> None:
    assert max(moment.num_held for moment in run(DENSE_LONGEST, REQUESTS)[0]) == 4
    assert max(moment.num_held for moment in run(PAGED, REQUESTS)[0]) >= 20


def test_blocks_are_taken_ahead_by_the_plans_ahead_and_no_more() -> None:
    """Tokens that two plans may add and LOOKAHEAD more: once prompts have run, a last block and those."""
    for moment in run(PAGED, [Request([1 + i] * 20, 100, 100) for i in range(8)])[0]:
        assert moment.use.reserved == moment.use.external == 0
        if moment.num_rows == moment.num_held:
            assert moment.use.tail <= moment.use.internal <= moment.num_held * (15 + 2 + LOOKAHEAD)


def test_who_cannot_know_how_long_outputs_get_holds_fewer_at_first_and_learns() -> None:
    moments = run(PAGED_UNKNOWING, UNKNOWING)[0]
    assert moments[0].num_held < 20 < max(moment.num_held for moment in moments)


def test_dense_reserves_what_it_says() -> None:
    for name, num_slots in ((DENSE_LONGEST, MAX_MODEL_LEN), (DENSE_POWER, 96)):  # 20 + 64, to the border of a block
        contender = CONTENDERS[name](LIMITS, NUM_BLOCKS)
        use = next(iter(Drive(contender, local_worker(FLAGS), [Request([1] * 20, 33, 33)]))).use
        assert (use.tokens, use.reserved, use.internal) == (20, 32, num_slots - 52)


def test_a_request_behind_holes_waits_though_enough_is_free() -> None:
    """Four of 512 fill the memory; the first and third end, and one of 1,024 finds no room until the second does."""
    limits = PlannerLimits(16, max_num_seqs=8, max_num_batched_tokens=512, overcommit=1.0)
    sizes = {1: 512, 2: 512, 3: 512, 4: 512, 5: 1024}
    contender = dense(limits, 2048 // 16, lambda sequence: sizes[sequence.seq_id])
    outputs = [10, 60, 10, 60, 10]
    drive = Drive(contender, local_worker(FLAGS), [Request([1] * 8, n, n) for n in outputs])
    planner = contender.planner
    assert isinstance(planner, DensePlanner)
    moments = list(drive)
    external = [moment.use.external for moment in moments]
    assert set(external) == {0, 1024}
    assert 30 < external.count(1024) <= 60
    assert max(moment.num_held for moment in moments) == 4
    assert planner.ranges.num_free_slots == 2048


def test_outcomes_weigh_moments_by_their_time_and_add_up() -> None:
    moments = run(DENSE_POWER, REQUESTS)[0]
    first, second = Outcome(), Outcome()
    for moment in moments[:20]:
        first.add(moment)
    for moment in moments[20:]:
        second.add(moment)
    both = first + second
    assert both.seconds == pytest.approx(sum(moment.seconds for moment in moments))
    assert both.use.whole == pytest.approx(NUM_BLOCKS * 16 * both.seconds)
    assert both.mean_num_held == pytest.approx(sum(m.num_held * m.seconds for m in moments) / both.seconds)
    assert both.max_num_held == max(moment.num_held for moment in moments)
