"""How many steps a plan has, by what its tokens and whoever comes may wait."""

from typing import cast

import pytest

from scheduler.live_request import NOBODY_WAITS, LiveRequest
from scheduler.plan_length import MAX_STEPS_PER_PLAN, PlanLength
from scheduler.request import RequestBody


def measured(step_s: float, num_sequences: int = 8) -> PlanLength:
    """Of plans of 12.5 ms."""
    length = PlanLength(0.0125, 0.001)
    for _ in range(50):
        length.on_decodes(num_sequences, step_s)
    return length


@pytest.mark.parametrize(
    ("step_s", "num_steps"), [(0.020, 1), (0.012, 2), (0.007, 2), (0.005, 3), (0.0001, MAX_STEPS_PER_PLAN)]
)
def test_steps_go_together_while_the_first_one_s_tokens_may_wait(step_s: float, num_steps: int) -> None:
    assert measured(step_s).num_steps(8, patience=1) == num_steps


@pytest.mark.parametrize(
    ("step_s", "patience", "num_steps"),
    [
        (0.012, 4, 4),  # as many as they gather
        (0.012, 3, 3),
        (0.012, 1, 2),  # two steps are no long wait
        (0.012, 8, 5),  # and no more than who comes can wait for
        (0.012, 16, 5),
        (0.020, 16, 3),
        (0.060, 16, 1),
        (0.004, 3, 4),  # as many as for whoever takes token by token
        (0.004, 8, 8),
        (0.004, NOBODY_WAITS, 13),
        (0.001, NOBODY_WAITS, MAX_STEPS_PER_PLAN),
    ],
)
def test_plans_are_longer_where_all_gather_tokens(step_s: float, patience: int, num_steps: int) -> None:
    assert measured(step_s).num_steps(8, patience) == num_steps


def test_without_time_to_wait_there_is_one_step_however_patient_they_are() -> None:
    length = PlanLength(0.0, 0.001)
    assert length.num_steps(1, NOBODY_WAITS) == 1


def test_who_has_measured_nothing_plans_step_by_step() -> None:
    length = PlanLength(0.015, 0.0)
    assert length.num_steps(1, NOBODY_WAITS) == 1
    length.on_decodes(4, 0.005)
    assert length.num_steps(4, patience=1) == 4


def test_a_larger_batch_is_taken_for_as_much_slower_until_it_is_measured() -> None:
    length = measured(0.004, num_sequences=1)
    assert length.num_steps(1, patience=1) == 4
    assert length.num_steps(64, NOBODY_WAITS) == 1
    for _ in range(10):
        length.on_decodes(64, 0.006)
    assert length.num_steps(64, patience=1) == 3
    assert length.num_steps(8, patience=1) == 3, "a smaller one is not known to be faster"


def test_a_request_is_as_patient_as_its_least_patient_stream() -> None:
    live = LiveRequest(cast(RequestBody, None))  # nothing is asked of it
    assert live.patience == NOBODY_WAITS
    live.attach(16)
    assert live.patience == 16
    live.attach(1)
    live.attach(8)
    assert (live.patience, live.num_streams) == (1, 3)
    live.detach(1)
    assert live.patience == 8
    live.detach(8)
    live.detach(16)
    assert (live.patience, live.num_streams) == (NOBODY_WAITS, 0)
