"""The harness against a server whose delays are known and which keeps its own time (see double.py)."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.load.double import RETRY_AFTER_S
from tests.load.harness.backend import connect
from tests.load.harness.figures import Latencies, Samples, summary
from tests.load.harness.generator_figures import generator_figures
from tests.load.harness.records import Outcome, Record
from tests.load.harness.result import run_result
from tests.load.harness.run import Interrupt, RawRun, run_once
from tests.load.harness.server_figures import server_figures
from tests.load.harness.settings import Dataset, Leavers, Measures, Pace, Settings, Target
from tests.stack import ROOT

TOLERANCE = 0.02
MAX_TRIES = 6
"""A machine that others share delays a message between two clocks now and then: so many chances to meet a quiet one."""
NICENESS = -15
STALL_AT_S, STALL_S = 1.0, 1.0
NUM_TOKENS = 8
BACKENDS = ("pagoda", "openai")


@dataclass
class Double:
    """A running double."""

    process: "subprocess.Popen[str]"
    ports: dict[str, int]

    def target(self, backend: str) -> Target:
        if backend == "pagoda":
            return Target(address=f"127.0.0.1:{self.ports['grpc']}")
        return Target(backend="openai", address=f"http://127.0.0.1:{self.ports['http']}")

    def seen(self) -> list[dict[str, Any]]:
        """What it saw since this was last asked."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("seen\n")
        self.process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self.process.stdout.readline())
        return found


@contextlib.contextmanager
def double(*flags: object) -> Iterator[Double]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    command = [sys.executable, "-m", "tests.load.double", *map(str, flags)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield Double(process, json.loads(process.stdout.readline()))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def plain() -> Iterator[Double]:
    """One that neither fails nor stalls, for several tests."""
    with favoured(), double() as server:
        yield server


@contextlib.contextmanager
def favoured() -> Iterator[None]:
    """The double and the generators run before what else this machine does, where we may ask for that."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


async def run(settings: Settings) -> RawRun:
    backend = connect(settings.target)
    try:
        model = await backend.model()
        return await run_once(settings, backend, model, lambda *_: None, Interrupt())
    finally:
        await backend.close()


def load(target: Target, **fields: Any) -> Settings:
    dataset = Dataset(input_len=6, output_len=NUM_TOKENS)
    settings = Settings(target, pace=Pace(num_prompts=60, request_rate=20.0), dataset=dataset)
    return replace(settings, **fields)


# -- percentiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "num_processes"), [("pagoda", 3), ("openai", 1)])
def test_percentiles_are_those_that_the_double_measured(plain: Double, backend: str, num_processes: int) -> None:
    differences: dict[str, float] = {}
    for _ in range(MAX_TRIES):
        with favoured():
            result = asyncio.run(run(load(plain.target(backend), num_processes=num_processes)))
        all_seen = plain.seen()
        assert Counter(seen["how"] for seen in all_seen) == {"completed": 60}
        differences = worst_differences(Latencies.of(result.records), all_seen)
        if max(differences.values()) <= TOLERANCE:
            return
    raise AssertionError(f"further apart than {TOLERANCE:.0%}, in each of {MAX_TRIES} tries: {differences}")


def worst_differences(ours: Latencies, seen: list[dict[str, Any]]) -> dict[str, float]:
    """Of each metric, over the percentiles that are reported: how far ours is from the double's, relatively."""
    theirs = {
        "ttft": np.array([s["sent_s"][0] - s["arrived_s"] for s in seen]),
        "tpot": np.array([(s["sent_s"][-1] - s["sent_s"][0]) / (NUM_TOKENS - 1) for s in seen]),
        "itl": np.concatenate([np.diff(s["sent_s"]) for s in seen]),
        "e2el": np.array([s["sent_s"][-1] - s["arrived_s"] for s in seen]),
    }
    return {name: _worst(getattr(ours, name), samples) for name, samples in theirs.items()}


def _worst(ours: Samples, theirs: Samples) -> float:
    assert len(ours) == len(theirs)
    pairs = [(np.percentile(ours, p), np.percentile(theirs, p)) for p in (50, 90, 95, 99)]
    pairs.append((np.mean(ours), np.mean(theirs)))
    return max(float(abs(a / b - 1)) for a, b in pairs)


# -- coordinated omission ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_concurrency", [None, 12])
def test_a_stall_shows_in_every_request_that_was_due_meanwhile(max_concurrency: int | None) -> None:
    """Also in those that were held back because too many were under way: a place that is late is latency, too."""
    pace = Pace(num_prompts=55, request_rate=25.0, max_concurrency=max_concurrency)
    with double("--stall-at-s", STALL_AT_S, "--stall-s", STALL_S) as server:
        result = asyncio.run(run(load(server.target("pagoda"), pace=pace, dataset=Dataset(input_len=6, output_len=2))))
        stall_from_s = min(seen["arrived_s"] for seen in server.seen()) + STALL_AT_S
    records = result.records
    assert all(record.outcome is Outcome.COMPLETED for record in records)
    stall_to_s = stall_from_s + STALL_S
    meanwhile = [record for record in records if stall_from_s - 0.1 <= record.due_s < stall_to_s - 0.2]
    assert len(meanwhile) > 10
    for record in meanwhile:  # nothing comes within 0.2 s of a request, so all of them met the stall
        assert record.ttft_s >= stall_to_s - record.due_s - 0.01
    assert max(record.ttft_s for record in records) >= 0.8 * STALL_S
    if max_concurrency:
        held_back = [record for record in meanwhile if record.sent_s >= stall_to_s - 0.01]
        assert held_back, "the limit held nothing back"
        from_sending = [record.chunk_times_s[0] - record.sent_s for record in held_back]
        from_due = [record.ttft_s for record in held_back]
        assert np.mean(from_due) > np.mean(from_sending) + 0.2, "what a client that waits for places would overlook"


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_failures_are_counted_by_their_status(backend: str) -> None:
    with double("--fail-every", 5) as server:
        result = asyncio.run(run(load(server.target(backend), pace=Pace(num_prompts=40, request_rate=40.0))))
    figures = summary(result.records, result.start_s, Measures())
    refused, broken = ("RESOURCE_EXHAUSTED", "INTERNAL") if backend == "pagoda" else ("HTTP 429", "HTTP stream")
    assert figures["errors_by_status"] == {refused: 8, broken: 8}
    assert (figures["completed"], figures["failed"]) == (24, 16)
    delays_s = {record.retry_after_s for record in result.records if record.status == refused}
    assert delays_s == {RETRY_AFTER_S}
    assert {record.num_output_tokens for record in result.records if record.status == broken} == {2}
    failures = run_result(result, "")["failures"]
    assert {row["status"]: row["with_retry_delay"] for row in failures} == {refused: 8, broken: 0}  # type: ignore[index,attr-defined]


def test_who_cancels_and_who_disconnects_is_told_apart(plain: Double) -> None:
    leavers = Leavers(cancel_share=0.3, disconnect_share=0.3, after_tokens=3)
    result = asyncio.run(run(load(plain.target("pagoda"), leavers=leavers)))
    ours = Counter(record.outcome for record in result.records)
    theirs = Counter(seen["how"] for seen in plain.seen())
    assert ours[Outcome.CANCELLED] == theirs["cancelled"] > 5
    assert ours[Outcome.DISCONNECTED] == theirs["left"] > 5
    assert ours[Outcome.COMPLETED] == theirs["completed"] > 5
    assert ours[Outcome.FAILED] == 0
    for record in result.records:
        if record.outcome is Outcome.DISCONNECTED:
            assert record.num_output_tokens == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_leaves_after_a_time_leaves_then(plain: Double, backend: str) -> None:
    cancel_share = 0.4 if backend == "pagoda" else 0.0
    leavers = Leavers(cancel_share, disconnect_share=0.4, after_s=0.5)
    settings = load(plain.target(backend), leavers=leavers, pace=Pace(num_prompts=40, request_rate=40.0))
    result = asyncio.run(run(settings))
    hows = Counter(seen["how"] for seen in plain.seen())
    left = [record for record in result.records if record.outcome is Outcome.DISCONNECTED]
    assert len(left) == hows["left"] > 5
    assert all(0.49 < record.end_s - record.sent_s < 2.0 for record in left)
    cancelled = [record for record in result.records if record.outcome is Outcome.CANCELLED]
    assert len(cancelled) == hows["cancelled"]
    assert bool(cancelled) == (backend == "pagoda")


# -- paces ------------------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_its_places_busy_and_no_more(plain: Double) -> None:
    pace = Pace(max_concurrency=7, duration_s=2.5)
    result = asyncio.run(run(load(plain.target("pagoda"), pace=pace, num_processes=2)))
    records = result.records
    assert summary(records, result.start_s, Measures())["max_concurrent_requests"] == 7
    assert max(record.sent_s for record in records) - result.start_s < 3.5
    assert len({record.index for record in records}) == len(records) > 12
    assert len(records) == len(plain.seen())
    watched = server_figures(result.samples, result.start_s)
    assert watched is not None
    assert (watched["max_running"], watched["is_idle_after"]) == (7, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_goes_on_after_each_answer_with_all_that_was_said(plain: Double, backend: str) -> None:
    dataset = Dataset("conversation", input_len=5, output_len=3, length_sigma=0, num_turns=3, think_time_s=0.1)
    settings = load(plain.target(backend), dataset=dataset, pace=Pace(num_prompts=6, request_rate=20.0))
    result = asyncio.run(run(settings))
    plain.seen()
    by_conversation: dict[int, list[Record]] = {}
    for record in result.records:
        by_conversation.setdefault(record.index, []).append(record)
    assert len(by_conversation) == 6
    for turns in by_conversation.values():
        assert [turn.num_prompt_tokens for turn in turns] == [5, 5 + 3 + 5, 5 + 3 + 5 + 3 + 5]
        for before, after in itertools.pairwise(turns):
            assert after.due_s >= before.end_s


def test_a_generator_that_is_too_slow_for_its_plan_says_so(plain: Double) -> None:
    """Hundreds at one moment: the last of them can't be sent in time."""
    pace = Pace(num_prompts=600, request_rate=math.inf)
    settings = load(plain.target("pagoda"), pace=pace, dataset=Dataset(input_len=1500, output_len=1))
    result = asyncio.run(run(settings))
    plain.seen()
    figures = generator_figures(result.generations, result.records)
    assert "after they were due" in str(figures["complaints"]), figures
