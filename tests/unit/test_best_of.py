"""What ranks choices: sums that nobody adds up differently, logs that give them back, and an order without ties."""

import random
from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagoda.v1 import worker_pb2 as pb

from scheduler.best_of import WORDS_PER_TOKEN, from_words, rank, score, to_words
from scheduler.float_bits import to_float32
from scheduler.results import ProtocolError
from scheduler.sequence import FinishReason
from tests.unit.planner_sim import Arrival, SimLimits, Simulation, SimWorker

LOGPROBS = st.floats(-(2.0**100), 0.0, width=32)
TOKENS = st.lists(st.tuples(st.integers(0, 2**32 - 1), LOGPROBS))
STOP, LENGTH, ABORT, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR


@given(TOKENS)
def test_a_log_gives_back_what_was_decided_on(tokens: list[tuple[int, float]]) -> None:
    token_ids, logprobs = [token for token, _ in tokens], [logprob for _, logprob in tokens]
    words = to_words(token_ids, logprobs)
    assert len(words) == WORDS_PER_TOKEN * len(tokens)
    assert all(0 <= word < 2**32 for word in words)
    assert from_words(words) == (token_ids, logprobs)


@given(st.lists(LOGPROBS), st.randoms())
def test_a_score_does_not_depend_on_the_order_of_the_sum(logprobs: list[float], shuffle: random.Random) -> None:
    shuffled = shuffle.sample(logprobs, len(logprobs))
    assert score(logprobs) == score(shuffled) == fsum(logprobs)


def test_a_longer_choice_is_not_favoured() -> None:
    """The plain sum: not divided by the length."""
    short, long = score([-2.0]), score([-1.0] * 3)
    assert rank([long, short], [LENGTH, LENGTH]) == [1, 0]


def test_equals_are_ranked_by_their_number() -> None:
    scores = [to_float32(-0.1), -0.5, to_float32(-0.1), -0.5, -0.01]
    assert rank(scores, [STOP] * 5) == [4, 0, 2, 1, 3]


def test_what_failed_shows_and_what_was_cut_short_stands_behind() -> None:
    assert rank([-1.0, -9.0, -2.0, -5.0], [ABORT, STOP, LENGTH, ERROR]) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("reported", "message"), [((), "no log probabilities of sequence 1"), ((-0.5,), "of some of its tokens only")]
)
def test_a_worker_that_keeps_log_probabilities_back_broke_the_contract(
    monkeypatch: pytest.MonkeyPatch, reported: tuple[float, ...], message: str
) -> None:
    run = SimWorker.run

    def run_and_report(worker: SimWorker, plan: pb.StepPlan) -> pb.StepResult:
        result = run(worker, plan)
        result.token_logprobs.extend(reported)
        return result

    monkeypatch.setattr(SimWorker, "run", run_and_report)
    simulation = Simulation(SimLimits(num_blocks=40), [Arrival((1, 2, 3), 8, n=2)])
    simulation.step()
    for seq_id in (1, 2):
        simulation.sequence(seq_id).logprobs = []
    with pytest.raises(ProtocolError, match=message):
        simulation.run()
