"""Figures of a load run, made from records whose figures are known."""

from array import array

import numpy as np
import pytest

from tests.load.harness.backend import ServerSample
from tests.load.harness.compare import comparison_rows
from tests.load.harness.figures import Latencies, concurrency_by_second, histogram, is_good, summary
from tests.load.harness.generator_figures import generator_figures
from tests.load.harness.knee import stage_settings
from tests.load.harness.records import Generation, Outcome, Record
from tests.load.harness.run import RawRun
from tests.load.harness.server_figures import server_figures
from tests.load.harness.settings import Knee, Measures, Pace, Ramp, Settings
from tests.load.harness.workload import ServedModel

START_S = 1000.0


def record(
    due_s: float,
    first_s: float = 0.1,
    gaps_s: tuple[float, ...] = (0.01,) * 4,
    outcome: Outcome = Outcome.COMPLETED,
    late_s: float = 0.0,
) -> Record:
    """Due at so many seconds after the start, its first token so many after that, then one token per gap."""
    times_s = START_S + due_s + first_s + np.cumsum([0.0, *gaps_s])
    return Record(
        index=0,
        turn=0,
        due_s=START_S + due_s,
        sent_s=START_S + due_s + late_s,
        end_s=float(times_s[-1]),
        is_paced=True,
        outcome=outcome,
        status="RESOURCE_EXHAUSTED" if outcome is Outcome.FAILED else "",
        num_prompt_tokens=7,
        num_output_tokens=len(times_s),
        chunk_times_s=array("d", times_s),
        chunk_tokens=array("I", [1] * len(times_s)),
    )


def refused(due_s: float) -> Record:
    return Record(0, 0, START_S + due_s, START_S + due_s, START_S + due_s + 0.001, True, status="RESOURCE_EXHAUSTED")


def generation(records: list[Record], lags_s: tuple[float, ...] = (0.001,) * 100, cpu_s: float = 1.0) -> Generation:
    return Generation(records, cpu_s, 10.0, array("d", lags_s))


def test_latencies_count_from_when_a_request_was_due_however_late_it_was_sent() -> None:
    figures = summary([record(1.0, first_s=0.5, late_s=0.4)], START_S, Measures())
    assert figures["mean_ttft_ms"] == pytest.approx(500)
    assert figures["mean_e2el_ms"] == pytest.approx(540)
    assert figures["mean_tpot_ms"] == pytest.approx(10)


def test_percentiles_are_numpys_over_the_samples_themselves() -> None:
    rng = np.random.default_rng(0)
    firsts = rng.lognormal(-2, 1, 500)
    figures = summary([record(i / 100, float(first)) for i, first in enumerate(firsts)], START_S, Measures())
    for percentile in (50, 90, 95, 99):
        assert figures[f"p{percentile}_ttft_ms"] == pytest.approx(1e3 * np.percentile(firsts, percentile))
    assert figures["median_ttft_ms"] == figures["p50_ttft_ms"]


def test_records_of_several_processes_are_one_sample_set() -> None:
    """Merged exactly: no mean of percentiles."""
    records = [record(i / 10, 0.01 * (1 + i % 37)) for i in range(200)]
    generations = [generation(records[number::3]) for number in range(3)]
    run = RawRun(Settings(), ServedModel("m"), 0.0, START_S, generations, [])
    assert summary(run.records, START_S, Measures()) == summary(records, START_S, Measures())


def test_each_kind_of_end_is_counted_as_what_it_is() -> None:
    records = [record(0.0), record(0.1, outcome=Outcome.CANCELLED), record(0.2, outcome=Outcome.DISCONNECTED)]
    figures = summary([*records, refused(0.3), refused(0.4)], START_S, Measures(goodput_ms=(("ttft", 1e9),)))
    counts = [figures[name] for name in ("completed", "cancelled", "disconnected", "failed", "num_requests")]
    assert counts == [1, 1, 1, 2, 5]
    assert figures["errors_by_status"] == {"RESOURCE_EXHAUSTED": 2}
    assert figures["good_share"] == pytest.approx(1 / 5), "who was refused or left is not served well"


def test_a_good_request_keeps_every_limit() -> None:
    limits = {"ttft": 100.0, "tpot": 20.0, "e2el": 200.0}
    assert is_good(record(0, 0.09), limits)
    assert not is_good(record(0, 0.11), limits)
    assert not is_good(record(0, 0.05, (0.03,) * 4), limits)
    assert not is_good(record(0, 0.09, (0.019,) * 9), limits)
    assert not is_good(record(0, 0.01, outcome=Outcome.CANCELLED), limits)


def test_a_run_without_a_single_token_has_figures_all_the_same() -> None:
    figures = summary([refused(0.0)], START_S, Measures())
    assert figures["mean_ttft_ms"] is None
    assert figures["output_throughput"] == 0
    assert summary([], START_S, Measures())["num_requests"] == 0


def test_a_histogram_loses_no_sample() -> None:
    latencies = Latencies.of([record(0, gaps_s=(1e-9, 0.001, 0.01, 3.0, 1000.0))])
    found = histogram(latencies.itl)
    assert sum(found["counts"]) == 5  # type: ignore[call-overload]
    assert len(found["edges_ms"]) == len(found["counts"]) + 1  # type: ignore[arg-type]
    assert histogram(np.array([])) == {"edges_ms": [], "counts": []}


def test_concurrency_is_what_was_sent_and_had_not_ended() -> None:
    assert concurrency_by_second([record(0.5, 2.0), record(0.5, 1.0), record(2.5, 1.0)], START_S) == [0, 2, 1, 1]


def test_a_generator_that_came_late_says_so() -> None:
    in_time = [record(i / 10, late_s=0.001) for i in range(100)]
    assert generator_figures([generation(in_time)], in_time)["complaints"] == []
    late = [record(i / 10, late_s=0.05) for i in range(100)]
    assert "sent 50 ms" in str(generator_figures([generation(late)], late)["complaints"])
    slow = generation(in_time, lags_s=(0.03,) * 10)
    assert "behind" in str(generator_figures([slow], in_time)["complaints"])
    busy = generator_figures([generation([]), generation(in_time, cpu_s=9.9)], in_time)
    assert "99% of a core" in str(busy["complaints"])


def test_server_counters_are_differences_and_peaks() -> None:
    def sample(at_s: float, running: int, queried: float, hit: float) -> ServerSample:
        totals = {"num_prefix_query_tokens": queried, "num_prefix_hit_tokens": hit}
        blocks = {"free": 10 - running, "referenced": running, "cached": 0}
        return ServerSample(START_S + at_s, running, 0, running, running, blocks, totals)

    found = server_figures([sample(-1, 0, 100, 50), sample(1, 4, 200, 80), sample(2, 0, 300, 150)], START_S)
    assert found is not None
    assert found["prefix_hit_rate"] == pytest.approx(0.5)
    assert (found["max_running"], found["max_referenced_blocks"], found["is_idle_after"]) == (4, 4, True)
    assert server_figures([], START_S) is None


def test_stages_grow_from_start_to_end_with_prompts_of_their_own() -> None:
    settings = Settings(
        pace=Pace(ramp=Ramp("exponential", 1, 8)),
        measures=Measures(goodput_ms=(("ttft", 100.0),)),
        knee=Knee(num_stages=4, stage_s=3.0),
    )
    stages = stage_settings(settings)
    assert [rate for rate, _ in stages] == pytest.approx([1, 2, 4, 8])
    assert len({stage.seed for _, stage in stages}) == 4
    assert {stage.pace.duration_s for _, stage in stages} == {3.0}


def test_a_comparison_says_which_way_is_better() -> None:
    slow, fast = (summary([record(0, first_s)], START_S, Measures()) for first_s in (0.4, 0.1))
    rows = {row[0]: row[3] for row in comparison_rows(slow, fast)}
    assert rows["mean ttft ms"] == "0.25x, better"
    assert rows["request throughput"].endswith("better")
    assert rows["mean tpot ms"] == "1.00x, alike"
    assert rows["completed"] == "1.00x"
