"""The rule for the choice of a worker: what is followed, how far, and what is not."""

import itertools
from collections.abc import Iterable

import pytest

from scheduler.admitter import PlannerLimits
from scheduler.block_hash import extend_chain, root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.planner import Planner
from scheduler.sequence import Sequence, SequenceLimits
from scheduler.worker_choice import Outlook, best_worker

BLOCK = 16
IDLE = Outlook(0, 0, 0)


class Workers:
    """Planners side by side, and requests that come to them by the rule."""

    def __init__(self, num_workers: int, max_num_batched_tokens: int = 256) -> None:
        limits = PlannerLimits(BLOCK, 256, max_num_batched_tokens, overcommit=8.0)
        self.planners = [Planner(limits, BlockManager(4000, Changes())) for _ in range(num_workers)]
        self._seq_ids = itertools.count(1)

    def choose(self, sequence: Sequence) -> int:
        return best_worker(len(sequence.token_ids), [planner.outlook(sequence) for planner in self.planners])

    def request(self, prompt: Iterable[int], salt: str = "") -> Sequence:
        token_ids = list(prompt)
        sequence = Sequence(
            seq_id=next(self._seq_ids),
            request_id="r",
            choice=0,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            limits=SequenceLimits(8, frozenset(), ignores_eos=True),
            root_hash=root_hash("model", "float32", "", salt),
        )
        extend_chain(sequence.root_hash, sequence.block_hashes, token_ids, BLOCK)
        return sequence

    def come(self, prompt: Iterable[int], salt: str = "") -> int:
        """A request that is queued where it is chosen to."""
        sequence = self.request(prompt, salt)
        number = self.choose(sequence)
        self.planners[number].expect(sequence)
        self.planners[number].enqueue(sequence)
        return number

    def admit(self) -> None:
        for planner in self.planners:
            planner.grow_and_admit(0)


def prompt(own: int, num_shared: int, num_own: int) -> list[int]:
    """Of a prefix that all share, and tokens of its own."""
    return [7] * num_shared + [1000 + own] * num_own


def test_who_computes_a_prefix_is_followed_whether_it_runs_or_waits() -> None:
    for admits in (False, True):
        workers = Workers(3)
        leader = workers.come(prompt(0, 1024, 32))
        if admits:
            workers.admit()
        assert {workers.come(prompt(i, 1024, 32)) for i in range(1, 20)} == {leader}


def test_who_is_only_on_the_way_is_followed_too_and_no_longer_than_that() -> None:
    workers = Workers(2)
    leader, follower = workers.request(prompt(0, 1024, 32)), workers.request(prompt(1, 1024, 32))
    workers.planners[1].expect(leader)
    assert workers.choose(follower) == 1
    workers.planners[1].expect_no_more(leader)
    assert workers.choose(follower) == 0
    assert workers.planners[1].outlook(follower) == IDLE


def test_one_that_waits_is_not_forgotten_with_its_way() -> None:
    workers = Workers(2)
    sequence = workers.request(prompt(0, 1024, 32))
    workers.planners[0].expect(sequence)
    workers.planners[0].enqueue(sequence)
    workers.planners[0].expect_no_more(sequence)
    outlook = workers.planners[0].outlook(sequence)
    assert (outlook.num_cached, outlook.num_promised) == (0, 1056)
    assert outlook.num_queued == 1056 + 16
    workers.planners[0].finish(sequence)
    assert workers.planners[0].outlook(sequence) == IDLE


def test_followers_count_with_their_own_tokens_alone() -> None:
    workers = Workers(1)
    for i in range(5):
        workers.come(prompt(i, 1024, 32))
    assert workers.planners[0].outlook(workers.request([5])).num_queued == 1024 + 5 * (32 + 16)


def test_a_follower_whose_leader_is_gone_leads() -> None:
    """What it is going to compute is still promised, to whoever comes now."""
    workers = Workers(2)
    leader, follower = workers.request(prompt(0, 1024, 32)), workers.request(prompt(1, 1024, 32))
    for sequence in (leader, follower):
        workers.planners[1].enqueue(sequence)
    workers.admit()
    workers.planners[1].finish(leader)
    assert workers.choose(workers.request(prompt(2, 1024, 32))) == 1
    workers.admit()
    assert workers.planners[1].running == [follower]
    assert workers.choose(workers.request(prompt(2, 1024, 32))) == 1


def test_a_worker_that_is_behind_by_far_is_not_followed() -> None:
    """By more than three times what following saves, whatever stands before both."""
    for num_each in (0, 5000):
        other = Outlook(num_each, 0, 0)
        assert best_worker(1100, [Outlook(num_each + 3 * 1024, 0, 1024), other]) == 0
        assert best_worker(1100, [Outlook(num_each + 3 * 1024 + 1, 0, 1024), other]) == 1


@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_block_that_thousands_of_prompts_share_herds_nobody(num_workers: int) -> None:
    workers = Workers(num_workers)
    came = [workers.come(prompt(i, BLOCK, 500)) for i in range(100 * num_workers)]
    counts = [came.count(number) for number in range(num_workers)]
    assert max(counts) - min(counts) <= 1


def test_a_hot_prefix_gets_a_second_home_only_under_load() -> None:
    """A burst follows; when its queue is three times as long as the prefix, the next one computes it elsewhere."""
    workers = Workers(2)
    came = [workers.come(prompt(i, 1024, 32)) for i in range(200)]
    first = came.index(1)
    assert set(came[:first]) == {0}
    assert first == -(-2 * 1024 // 48), "each has 32 tokens of its own, and counts as 16 more"
    assert abs(came.count(0) - came.count(1)) <= -(-1024 // 48), "from then on both have it: no more is queued at one"


def test_what_is_computed_already_weighs_what_it_saves() -> None:
    """Nobody computes it now: a copy elsewhere is no doubled work."""
    assert best_worker(1100, [Outlook(500, 1024, 1024), IDLE]) == 0
    assert best_worker(1100, [Outlook(1100, 1024, 1024), IDLE]) == 1


def test_who_has_it_already_is_as_good_as_who_computes_it() -> None:
    assert best_worker(1100, [Outlook(1024, 0, 1024), Outlook(0, 1024, 1024)]) == 1
    assert best_worker(1100, [Outlook(0, 1024, 1024), Outlook(1024, 0, 1024)]) == 0
    # Both are loaded: a third one must not compute it meanwhile.
    assert best_worker(1100, [Outlook(2000, 0, 1024), Outlook(2000, 1024, 1024), IDLE]) == 0


def test_only_the_part_on_its_way_counts_as_doubled() -> None:
    """Of 1,024 tokens all but 16 are published there: to compute these elsewhere is a copy."""
    assert best_worker(1100, [Outlook(1057, 1008, 1024), IDLE]) == 1
    assert best_worker(1100, [Outlook(1055, 1008, 1024), IDLE]) == 0


def test_of_two_who_are_followed_the_one_that_gets_further() -> None:
    assert best_worker(2100, [Outlook(0, 0, 512), Outlook(0, 0, 2048)]) == 1
    assert best_worker(2100, [Outlook(0, 0, 512), Outlook(5000, 0, 2048)]) == 0


def test_another_salt_is_never_followed() -> None:
    workers = Workers(2)
    leader = workers.come(prompt(0, 1024, 32), "a")
    workers.admit()
    assert workers.come(prompt(1, 1024, 32), "b") != leader
    assert workers.come(prompt(2, 1024, 32), "a") == leader


def test_equal_workers_are_taken_in_turn() -> None:
    workers = Workers(3)
    assert [workers.come([i] * 40) for i in range(6)] == [0, 1, 2, 0, 1, 2]
