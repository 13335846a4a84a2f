"""Forks at their edges: what a new owner makes of those that were begun, and candidates that are not whole."""

import pytest
from pagoda.v1 import worker_pb2 as pb

from scheduler.admitter import PlannerLimits
from scheduler.block_hash import root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner
from scheduler.results import ProtocolError
from scheduler.sequence import Sequence, SequenceLimits, SequenceStatus
from tests.unit.planner_sim import Arrival, SimLimits, Simulation, SimWorker

PROMPT = list(range(1, 7))  # a block of 4, and 2 tokens of the next


def choice(seq_id: int, output: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        request_id="r",
        choice=seq_id - 1,
        token_ids=[*PROMPT, *output],
        num_prompt_tokens=len(PROMPT),
        limits=SequenceLimits(8, frozenset(), ignores_eos=True),
        root_hash=root_hash("model", "float32", "", ""),
    )


@pytest.fixture
def planner() -> Planner:
    """A pool in which sequence 1 holds two blocks, and 2 and 3 are forks of it whose copies have not run."""
    blocks = BlockManager(12, Changes())
    table = blocks.reserve(1, (), 2)
    for child in (2, 3):
        blocks.fork(1, child, table[:1], (table[1], 2))
    again = BlockManager.from_image(blocks.image(), Changes())
    return Planner(PlannerLimits(4, 8, 64, 1.0), again)


def adopt(planner: Planner, sequence: Sequence, table: list[int], num_computed_tokens: int) -> Sequence:
    sequence.status = SequenceStatus.RUNNING
    sequence.block_ids = table
    sequence.num_acked_blocks = len(table)
    sequence.num_computed_tokens = sequence.num_planned_tokens = num_computed_tokens
    planner.adopt_running(sequence)
    return sequence


def test_a_fork_without_its_first_token_begins_anew(planner: Planner) -> None:
    """Its record says that nothing is computed: its parent's prompt may never have been finished."""
    parent = adopt(planner, choice(1), [1, 2], 3)
    sure = adopt(planner, choice(2, (50,)), [1, 3], len(PROMPT))
    unsure = adopt(planner, choice(3), [1, 4], 0)
    planner.settle()
    assert planner.running == [parent, sure]
    assert (unsure.status, unsure.attempt, unsure.block_ids) == (SequenceStatus.PREEMPTED, 1, [])
    assert list(planner.waiting) == [unsure]
    assert planner.redescribed == [unsure]
    planner.blocks.check([parent.block_ids, sure.block_ids])
    assert planner.blocks.pending_copies == {3: (2, 2), 4: (2, 2)}, "they hold their blocks until they are made again"


def test_a_fork_whose_first_token_was_sent_again_stays(planner: Planner) -> None:
    parent = adopt(planner, choice(1), [1, 2], 3)
    late = adopt(planner, choice(2), [1, 3], 0)
    late.num_computed_tokens = late.num_planned_tokens = len(PROMPT)  # as `apply_resent` does
    late.token_ids.append(50)
    planner.settle()
    assert planner.running == [parent, late]
    assert not planner.waiting


def test_followers_of_a_leader_that_went_on_without_them_are_queued(planner: Planner) -> None:
    leader, waits = adopt(planner, choice(1), [1, 2], 3), choice(3)
    planner.enqueue(waits, leader)
    planner.settle()
    assert (waits.leader, len(planner.waiting), planner.num_waiting) == (leader, 0, 1)
    leader.token_ids.append(50)  # its first token, of a plan that did not name the follower
    planner.settle()
    assert (waits.leader, list(planner.waiting), planner.num_waiting) == (None, [waits], 1)


def test_followers_of_a_leader_that_ends_run_without_it(planner: Planner) -> None:
    leader, waits = adopt(planner, choice(1), [1, 2], 3), choice(3)
    planner.enqueue(waits, leader)
    planner.finish(leader)
    assert list(planner.waiting) == [waits]
    planner.finish(waits)
    assert planner.num_waiting == 0


def test_a_worker_that_keeps_candidates_back_broke_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimWorker.run

    def run_and_keep_one(worker: SimWorker, plan: pb.StepPlan) -> pb.StepResult:
        result = run(worker, plan)
        del result.candidate_token_ids[-1:]
        return result

    monkeypatch.setattr(SimWorker, "run", run_and_keep_one)
    simulation = Simulation(SimLimits(num_blocks=40), [Arrival(tuple(PROMPT), 8, beam_width=3)])
    with pytest.raises(ProtocolError, match="5 candidates of a beam that needs 6"):
        simulation.run()
