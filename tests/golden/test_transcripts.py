"""Scripted scenarios against transcripts that were read and found right; PAGODA_GOLDEN=write writes them anew."""

import os
from pathlib import Path

import pytest

from tests.golden.transcript import Transcript
from tests.unit.planner_sim import Arrival, SimLimits, Simulation

FOLDER = Path(__file__).parent
PREFIX = (1,) * 8

SCENARIOS: dict[str, tuple[str, SimLimits, list[Arrival]]] = {
    "chunked_prefill_beside_decodes": (
        "A long prompt that hits a cached prefix is run in chunks, in what two decodes leave of each step.",
        SimLimits(32, 4, max_num_seqs=4, max_num_batched_tokens=6),
        [
            Arrival((*PREFIX, 2), 9, ignores_eos=True),
            Arrival((3, 3, 3), 10, ignores_eos=True),
            Arrival((*PREFIX, *(4,) * 10), 2, round=6, ignores_eos=True),
        ],
    ),
    "preempt_the_tail": (
        "Both grow, the pool is too small: the later one gives its blocks back, waits for its plans in flight, and\n"
        "goes on from the blocks that it published and that are still there.",
        SimLimits(8, 4, overcommit=100.0),
        [Arrival((1,) * 8, 13, ignores_eos=True), Arrival((2,) * 8, 13, ignores_eos=True)],
    ),
    "single_flight": (
        "Three prompts with one prefix at once: one computes it, the others wait for it and share it.",
        SimLimits(32, 4, max_num_batched_tokens=8),
        [Arrival((*PREFIX, 2, 3), 2), Arrival((*PREFIX, 4), 2), Arrival((*PREFIX, 5, 6, 7), 2)],
    ),
    "leader_cancelled": (
        "The one that computes the prefix is cancelled in the middle; one of those that waited goes on with it.",
        SimLimits(32, 4, max_num_batched_tokens=4),
        [Arrival((*PREFIX, 2, 3), 2, cancel_round=3), Arrival((*PREFIX, 4), 1), Arrival((*PREFIX, 5), 1)],
    ),
    "finish_and_reuse": (
        "What has ended stays in the cache until its blocks are needed: the tail of the older chain goes first.",
        SimLimits(6, 4),
        [
            Arrival((1,) * 12, 1),
            Arrival((2,) * 8, 2, round=6),
            Arrival((1,) * 13, 1, round=12),
            Arrival((3,) * 16, 1, round=18),
        ],
    ),
    "stop_with_a_plan_in_flight": (
        "An end that the plan after it did not know of: the row too many is dropped, its block reused behind it.",
        SimLimits(4, 4),
        [Arrival((1,) * 4, 8, stops_after=2), Arrival((2,) * 10, 4, round=3, ignores_eos=True)],
    ),
    "leave_a_plan": (
        "Plans of up to eight steps: who reaches its last token in the middle of one leaves it, the others go on.",
        SimLimits(32, 4, lookahead=4, steps_per_plan=8),
        [Arrival((seq_id,) * 3, most, ignores_eos=True) for seq_id, most in ((1, 14), (2, 4), (3, 20))],
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_transcript(name: str) -> None:
    title, limits, arrivals = SCENARIOS[name]
    simulation = Simulation(limits, arrivals).run()
    text = Transcript(title, simulation).write(simulation.rounds)
    golden = FOLDER / f"{name}.txt"
    if os.environ.get("PAGODA_GOLDEN") == "write":
        golden.write_text(text, "utf-8")
    assert text == golden.read_text("utf-8")


def test_every_transcript_has_its_scenario() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SCENARIOS)
