"""Histograms of many equal values at once, and what a request's life adds to them."""

from typing import cast

import pytest

from scheduler import request_metrics
from scheduler.live_request import EndState, LiveChoice, LiveRequest
from scheduler.request import RequestBody
from scheduler.request_metrics import RequestMetrics
from scheduler.sequence import Admission, FinishReason, Sequence, SequenceLimits
from scheduler.tally import Tally
from tests.unit.planner_sim import Arrival


class Clock:
    """What monotonic and time say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(request_metrics, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(request_metrics, "time", lambda: 1e9 + self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def a_request(n: int = 1) -> LiveRequest:
    live = LiveRequest(cast(RequestBody, Arrival((1, 2, 3), 9, n=n)))
    limits = SequenceLimits(9, frozenset(), True)
    live.choices = [LiveChoice(live, Sequence(i, "r", i, [1, 2, 3], 3, limits, b"")) for i in range(n)]
    return live


def log(metrics: RequestMetrics, *choices: LiveChoice, count: int = 1) -> None:
    """Each choice gets tokens, in one script."""
    rows = []
    for choice in choices:
        before = choice.sequence.num_output_tokens
        choice.sequence.token_ids += [7] * count
        rows.append((choice, before, before + count))
    metrics.note_tokens(rows)


def end(metrics: RequestMetrics, live: LiveRequest) -> None:
    for choice in live.choices:
        choice.end = EndState(FinishReason.LENGTH, 0)
    metrics.note_end(live)


def num_values(tally: Tally) -> int:
    return int(tally.cumulative()[-1][1])


def test_values_fall_into_buckets_as_prometheus_has_them() -> None:
    tally = Tally((1, 2.5))
    tally.observe(1.0)
    tally.observe(1.5, 3)
    tally.observe(9.0, 2)
    assert tally.cumulative() == [("1", 1.0), ("2.5", 4.0), ("+Inf", 6.0)]
    assert tally.total == 1.0 + 4.5 + 18.0


def test_the_times_of_a_request_add_up(clock: Clock) -> None:
    metrics, live = RequestMetrics(), a_request()
    metrics.note_arrival(live)
    (choice,) = live.choices
    choice.sequence.admissions.append(Admission("w", 1e9 + 100.5, 0, b"", ()))
    clock.now_s = 101.25
    log(metrics, choice)
    for now_s in (101.5, 102.5):
        clock.now_s = now_s
        log(metrics, choice)
    clock.now_s = 103.0
    end(metrics, live)
    assert metrics.time_to_first_token_s.total == 1.25
    assert (num_values(metrics.inter_token_latency_s), metrics.inter_token_latency_s.total) == (2, 1.25)
    assert metrics.queue_time_s.total == pytest.approx(0.5)
    assert metrics.prefill_time_s.total == pytest.approx(0.75)
    assert metrics.decode_time_s.total == 1.25
    assert metrics.time_per_output_token_s.total == 0.625
    assert metrics.e2e_latency_s.total == 3.0
    assert (metrics.num_prompt_tokens, metrics.num_generation_tokens) == (3, 3)
    assert metrics.num_ended == {"length": 1}


def test_choices_count_each_and_their_prompt_once(clock: Clock) -> None:
    metrics, live = RequestMetrics(), a_request(n=3)
    metrics.note_arrival(live)
    for now_s in (101.0, 101.125):
        clock.now_s = now_s
        log(metrics, *live.choices)
    end(metrics, live)
    assert metrics.num_prompt_tokens == 3
    assert metrics.num_generation_tokens == 6
    assert num_values(metrics.time_to_first_token_s) == 3
    assert (num_values(metrics.inter_token_latency_s), metrics.inter_token_latency_s.total) == (3, 0.375)
    assert metrics.num_ended == {"length": 3}


def test_what_was_taken_over_counts_with_what_was_seen_of_it(clock: Clock) -> None:
    metrics, live = RequestMetrics(), a_request()
    (choice,) = live.choices
    choice.sequence.token_ids += [7] * 4
    for now_s in (101.0, 101.5):
        clock.now_s = now_s
        log(metrics, choice)
    end(metrics, live)
    assert num_values(metrics.time_to_first_token_s) == num_values(metrics.e2e_latency_s) == 0
    assert (num_values(metrics.inter_token_latency_s), metrics.num_generation_tokens) == (1, 2)


def test_nothing_new_is_nothing(clock: Clock) -> None:
    metrics, live = RequestMetrics(), a_request()
    metrics.note_tokens([(live.choices[0], 5, 5)])
    assert metrics.num_generation_tokens == 0
    assert live.choices[0].last_token_s == 0.0
