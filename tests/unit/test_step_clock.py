"""When a step is over time, by a clock that the test holds."""

import pytest

from scheduler.step_clock import NUM_CALIBRATION_STEPS, UNCALIBRATED_DEADLINE_S, StepClock


class Time:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr("scheduler.step_clock.monotonic", found)
    return found


def run(
    clock: StepClock, time: Time, step_s: float, num_steps: int = NUM_CALIBRATION_STEPS, num_tokens: int = 8
) -> None:
    """Steps of equal length, one after the other."""
    for _ in range(num_steps):
        clock.on_plan(num_tokens)
        time.now += step_s
        clock.on_result(step_s, 0.0, back_to_back=True)


def test_nothing_is_overdue_where_nothing_runs(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.01)
    time.now += 1e6
    assert clock.overdue_s() == 0


def test_short_steps_have_two_seconds(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.01)
    clock.on_plan(8)
    time.now += 1.9
    assert clock.overdue_s() == 0
    time.now += 1.1
    assert clock.overdue_s() == pytest.approx(1.0)


def test_long_steps_have_three_times_what_was_foretold(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 4.0)
    clock.on_plan(8)
    time.now += 11.9
    assert clock.overdue_s() == 0
    time.now += 1.1
    assert clock.overdue_s() == pytest.approx(1.0)


def test_a_large_prefill_has_time_by_its_tokens(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.1, num_tokens=10)
    clock.on_plan(1000)
    time.now += 29.0
    assert clock.overdue_s() == 0
    time.now += 2.0
    assert clock.overdue_s() > 0


def test_no_step_is_judged_by_a_guess_before_there_are_measurements(time: Time) -> None:
    clock = StepClock(calibrated_step_s=0.01)
    run(clock, time, 0.01, NUM_CALIBRATION_STEPS - 1)
    clock.on_plan(8)
    time.now += UNCALIBRATED_DEADLINE_S - 1
    assert clock.overdue_s() == 0
    time.now += 2
    assert clock.overdue_s() > 0, "but even then a worker that hangs is noticed"


def test_a_plan_that_waits_behind_another_has_its_time_from_its_turn(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 1.0)
    clock.on_plan(8)
    clock.on_plan(8)
    time.now += 2.5
    clock.on_result(2.5, 0.0, back_to_back=True)
    time.now += 2.5
    assert clock.overdue_s() == 0


def test_time_in_which_the_scheduler_itself_stood_still_does_not_count(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.01)
    clock.on_plan(8)
    time.now += 30.0
    clock.excuse(29.5)
    assert time.now - clock.last_heard == pytest.approx(0.5)
    assert clock.overdue_s() == 0
    time.now += 2.5
    assert clock.overdue_s() == pytest.approx(1.0)


def test_idle_time_is_no_time_of_a_step(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.01)
    time.now += 3600
    clock.on_plan(8)
    assert clock.overdue_s() == 0


def test_the_mean_follows_the_steps_and_begins_with_the_worker_s_own(time: Time) -> None:
    clock = StepClock(calibrated_step_s=0.5)
    assert clock.step_s == 0.5
    run(clock, time, 0.1, 1)
    assert clock.step_s == pytest.approx(0.1)
    run(clock, time, 0.2, 100)
    assert clock.step_s == pytest.approx(0.2, rel=1e-3)


def test_results_and_heartbeats_are_signs_of_life(time: Time) -> None:
    clock = StepClock()
    time.now += 5
    clock.on_heartbeat()
    assert clock.last_heard == time.now
    time.now += 5
    clock.on_result(0.1, 0.0, back_to_back=False)
    assert clock.last_heard == time.now


def test_gaps_are_ranked_and_shares_counted(time: Time) -> None:
    clock = StepClock()
    assert (clock.gap_s(0.5), clock.back_to_back) == (0.0, 0.0)
    for i in range(100):
        clock.on_result(0.1, i / 1000, back_to_back=i % 4 == 0)
    assert clock.gap_s(0.5) == pytest.approx(0.050)
    assert clock.gap_s(0.99) == pytest.approx(0.099)
    assert clock.gap_s(1.0) == pytest.approx(0.099)
    assert clock.back_to_back == pytest.approx(0.25)


def test_plans_that_come_late_bring_another_one_ahead_until_they_no_longer_do() -> None:
    clock = StepClock()
    assert clock.num_plans_ahead == 1
    for _ in range(5):
        clock.on_result(0.005, 0.002, back_to_back=False)
    assert clock.num_plans_ahead == 2
    for _ in range(1000):
        clock.on_result(0.005, 0.0001, back_to_back=True)
    assert clock.num_plans_ahead == 1


def test_a_plan_of_several_steps_has_the_time_of_all(time: Time) -> None:
    clock = StepClock()
    run(clock, time, 0.5)
    clock.on_plan(32, num_steps=4)
    time.now += 5.9
    assert clock.overdue_s() == 0
    time.now += 1.1
    assert clock.overdue_s() == pytest.approx(1.0)


def test_a_worker_that_had_nothing_to_do_is_not_waiting_for_a_late_plan() -> None:
    clock = StepClock()
    for _ in range(100):
        clock.on_result(0.005, 0.3, back_to_back=False)
    assert clock.num_plans_ahead == 1
