"""The plan of a load run: known from settings and seed alone, dealt out whole, as bursty as asked."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.load.harness.arrivals import due_times_s
from tests.load.harness.errors import LoadError
from tests.load.harness.plan import Share, make_plan
from tests.load.harness.settings import Dataset, Knee, Leavers, Measures, Pace, Ramp, Settings
from tests.load.harness.workload import Leave, ServedModel

MODEL = ServedModel("m", vocab_size=500, max_model_len=2048, eos_token_ids=(7, 8))


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)])
def test_intervals_are_gamma_distributed_around_the_rate(burstiness: float, spread: float) -> None:
    """Shape k: mean 1 / rate, standard deviation 1 / sqrt(k) of the mean."""
    due_s = due_times_s(Pace(num_prompts=20_000, request_rate=50.0, burstiness=burstiness), seed=3)
    assert due_s is not None
    assert due_s[-1] == pytest.approx(20_000 / 50)
    gaps = np.diff(due_s)
    assert gaps.min() >= 0
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(spread, rel=0.05)


def test_the_same_seed_is_due_at_the_same_times_and_another_is_not() -> None:
    pace = Pace(num_prompts=50, request_rate=5.0)
    first, again, other = (due_times_s(pace, seed) for seed in (1, 1, 2))
    assert first is not None
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_reaches_its_end_at_the_last_request(strategy: str) -> None:
    ramp = Ramp(strategy, 10.0, 1000.0)
    due_s = due_times_s(Pace(num_prompts=6000, ramp=ramp), seed=1)
    assert due_s is not None
    rates = np.array([ramp.rate_at(number / 5999) for number in range(1, 6000)])
    in_means = np.diff(due_s) * rates  # each interval over what it should be on average
    for part in np.split(in_means[:5900], 10):
        assert part.mean() == pytest.approx(1, rel=0.15)


def test_who_waits_for_places_has_no_schedule_and_who_does_not_has_all_at_once() -> None:
    assert due_times_s(Pace(num_prompts=9, max_concurrency=3), 0) is None
    at_once = due_times_s(Pace(num_prompts=9), 0)
    assert at_once is not None
    assert at_once.tolist() == [0.0] * 9
    limited = due_times_s(Pace(num_prompts=9, max_concurrency=3, request_rate=2.0), 0)
    assert limited is not None, "a rate makes it an open loop, whatever may be sent at once"


def test_a_duration_is_filled_at_the_rate() -> None:
    due_s = due_times_s(Pace(request_rate=30.0, duration_s=10.0), 0)
    assert due_s is not None
    assert len(due_s) == pytest.approx(300, abs=1)
    assert due_s[-1] <= 10.0


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shares_are_the_whole_and_nothing_twice(count: int) -> None:
    settings = Settings(pace=Pace(num_prompts=100, request_rate=10.0, max_concurrency=10), num_processes=count)
    plan = make_plan(settings, MODEL)
    shares = [Share(number, count) for number in range(count)]
    dealt = [index for share in shares for index in share.indexes(plan)]
    assert sorted(dealt) == list(range(100))
    assert sum(share.part_of(10) for share in shares) == 10


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "means"), [("sharegpt", (161, 338)), ("alpaca", (19, 58))])
def test_lengths_have_the_data_sets_means(name: str, means: tuple[int, int]) -> None:
    model = dataclasses.replace(MODEL, max_model_len=0)
    plan = make_plan(Settings(pace=Pace(num_prompts=2000), dataset=Dataset(name)), model)
    turns = [plan.workload.conversation(index).turns[0] for index in range(2000)]
    assert np.mean([len(turn.token_ids) for turn in turns]) == pytest.approx(means[0], rel=0.03)
    assert np.mean([turn.max_tokens for turn in turns]) == pytest.approx(means[1], rel=0.03)


def test_a_conversation_is_the_same_in_any_process_and_another_for_another_index() -> None:
    settings = Settings(pace=Pace(num_prompts=10), dataset=Dataset(input_len=30, output_len=5))
    one, other = (make_plan(settings, MODEL).workload for _ in range(2))
    assert one.conversation(4) == other.conversation(4)
    assert one.conversation(4).turns[0].token_ids != one.conversation(5).turns[0].token_ids
    drawn = {token_id for index in range(10) for token_id in one.conversation(index).turns[0].token_ids}
    assert not drawn & {7, 8}, "an end token inside a prompt"
    assert max(drawn) < 500


def test_groups_share_their_prefix_and_nothing_else() -> None:
    dataset = Dataset("prefix_repetition", input_len=10, output_len=5, prefix_len=40, num_prefixes=3)
    workload = make_plan(Settings(pace=Pace(num_prompts=60), dataset=dataset), MODEL).workload
    prompts = [workload.conversation(index).turns[0].token_ids for index in range(60)]
    assert {len(prompt) for prompt in prompts} == {50}
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 3
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 60


def test_turns_follow_each_other_after_a_while_and_fit_the_model() -> None:
    dataset = Dataset("conversation", input_len=100, output_len=150, num_turns=12, think_time_s=2.0)
    workload = make_plan(Settings(pace=Pace(num_prompts=50), dataset=dataset), MODEL).workload
    conversations = [workload.conversation(index) for index in range(50)]
    think_s = [turn.think_s for conversation in conversations for turn in conversation.turns[1:]]
    assert np.mean(think_s) == pytest.approx(2.0, rel=0.2)
    assert all(conversation.turns[0].think_s == 0 for conversation in conversations)
    totals = [sum(len(turn.token_ids) + turn.max_tokens for turn in c.turns) for c in conversations]
    assert max(totals) <= MODEL.max_model_len
    assert 3 < np.mean([len(c.turns) for c in conversations]) < 12


def test_leavers_are_their_share() -> None:
    leavers = Leavers(cancel_share=0.2, disconnect_share=0.3, after_tokens=3)
    settings = Settings(pace=Pace(num_prompts=1000), dataset=Dataset(input_len=1, output_len=9), leavers=leavers)
    workload = make_plan(settings, MODEL).workload
    kinds = [workload.conversation(index).turns[0].leave for index in range(1000)]
    assert kinds.count(Leave.CANCELS) == pytest.approx(200, abs=40)
    assert kinds.count(Leave.DISCONNECTS) == pytest.approx(300, abs=45)


def test_a_trace_keeps_times_lengths_and_what_its_requests_share(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [1, 3]},
        {"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]},
        {"timestamp": 2000, "input_length": 20, "output_length": 2},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    plan = make_plan(Settings(dataset=Dataset("timed_trace", path)), MODEL)
    assert plan.due_s is not None
    assert plan.due_s.tolist() == [0.0, 1.5, 2.0]
    turns = [plan.workload.conversation(index).turns[0] for index in range(3)]
    assert [len(turn.token_ids) for turn in turns] == [600, 700, 20]
    assert [turn.max_tokens for turn in turns] == [4, 9, 2]
    assert turns[0].token_ids[:512] == turns[1].token_ids[:512]
    assert turns[0].token_ids[512:600] != turns[1].token_ids[512:600]


@pytest.mark.parametrize(
    ("line", "words"), [("{", "line 2"), ('{"timestamp": 1}', "input_length"), ("[]", "line 2"), ("", "no requests")]
)
def test_a_trace_that_is_wrong_is_refused_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(LoadError, match=words):
        make_plan(Settings(dataset=Dataset("timed_trace", path)), MODEL)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: Pace(request_rate=0), "--request-rate"),
        (lambda: Pace(request_rate=math.nan), "--request-rate"),
        (lambda: Pace(burstiness=0), "--burstiness"),
        (lambda: Pace(duration_s=3), "--duration-s"),
        (lambda: Pace(request_rate=2, ramp=Ramp("linear", 1, 2)), "--request-rate"),
        (lambda: Ramp("steep", 1, 2), "--ramp-up-strategy"),
        (lambda: Ramp("linear", 3, 2), "--ramp-up-end-rps"),
        (lambda: Leavers(cancel_share=0.5), "--leave-after-tokens"),
        (lambda: Leavers(0.6, 0.6, 1), "--disconnect-share"),
        (lambda: Dataset("sonnet"), "--dataset-name"),
        (lambda: Dataset("timed_trace"), "--dataset-path"),
        (lambda: Measures(goodput_ms=(("itl", 3.0),)), "--goodput"),
        (lambda: Settings(knee=Knee()), "--find-knee"),
        (lambda: Settings(pace=Pace(max_concurrency=2), num_processes=3), "--num-processes"),
    ],
)
def test_what_can_t_be_is_refused_by_its_flag(make: object, flag: str) -> None:
    with pytest.raises(LoadError, match=flag):
        make()  # type: ignore[operator]
