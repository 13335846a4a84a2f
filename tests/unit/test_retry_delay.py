"""When who found the queue full is told to come back."""

import itertools

import pytest

from scheduler.retry_delay import MAX_DELAY_S, WINDOW_S, RetryDelay


def overloaded(
    delay: RetryDelay, seconds: float, places_per_s: float, arrivals_per_s: float = 100.0
) -> list[float | None]:
    """A full queue of ten, whose places become free at a pace; what each of those that are refused is told."""
    told: list[float | None] = []
    num_waiting, num_freed = 0, 0
    for number in range(int(seconds * arrivals_per_s)):
        now_s = 50.0 + number / arrivals_per_s
        while num_freed < (now_s - 50.0) * places_per_s and num_waiting:
            num_freed, num_waiting = num_freed + 1, num_waiting - 1
        delay.note(now_s, num_waiting)
        if num_waiting >= 10:
            told.append(delay.refuse(now_s, num_waiting))
        else:
            delay.accept()
            num_waiting += 1
    return told


def test_each_is_told_a_moment_of_its_own_at_the_pace_of_the_places() -> None:
    told = overloaded(RetryDelay(), 3.0, places_per_s=20.0)
    moments = [(number, delay_s) for number, delay_s in enumerate(told) if delay_s is not None]
    first, last = moments[0], moments[-1]
    assert 0 < first[1] < 0.5
    # 80 are refused each second, and 20 of them can come back in one.
    assert last[1] == pytest.approx(len(moments) / 20 - 3.0, rel=0.3)
    assert all(later > earlier - 0.011 for (_, earlier), (_, later) in itertools.pairwise(moments))


def test_the_line_is_held_only_so_long() -> None:
    told = overloaded(RetryDelay(), 100.0, places_per_s=2.0)
    assert max(delay_s for delay_s in told if delay_s is not None) <= MAX_DELAY_S + 1e-6


def test_without_a_place_that_became_free_nothing_is_made_up() -> None:
    assert set(overloaded(RetryDelay(), 5.0, places_per_s=0.0)) == {None}


def test_what_was_long_ago_says_nothing_of_now() -> None:
    delay = RetryDelay()
    overloaded(delay, 3.0, places_per_s=20.0)
    delay.note(60.0 + WINDOW_S, 10)
    assert delay.refuse(60.0 + WINDOW_S, 10) is None


def test_a_queue_that_was_empty_begins_anew() -> None:
    """Ten arrivals in ten quiet seconds do not mean that a place takes a second."""
    delay = RetryDelay()
    for second in range(10):
        delay.note(float(second), 0)
        delay.accept()
    for number in range(20):  # now a burst; a place becomes free every 10 ms
        delay.note(10 + number / 10, 10)
        for _ in range(10 if number else 11):
            delay.accept()
    told = delay.refuse(12.0, 10)
    assert told is not None
    assert told < 0.05
