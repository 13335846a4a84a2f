"""The planner by random loads: whatever arrives, everything ends with exactly its tokens, and no rule is broken.

The simulation asserts after every round: the budgets, that plans name acknowledged blocks only, that every block is
free, referenced or cached, that decodes don't starve beside prefills, and that no slot is read that was not written
for exactly these tokens.
"""

import os
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.swap_ahead import Preemption
from tests.unit.planner_sim import Arrival, SimLimits, Simulation

IS_LONG = os.environ.get("PAGODA_TEST_LONG") == "1"
NUM_EXAMPLES = 2000 if IS_LONG else 140
PREFIXES = [(1,) * 4, (1,) * 8, (1, 2) * 6, (2,) * 12, ()]


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Up to a dozen requests, many with a common prefix."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        n = draw(st.sampled_from([1, 1, 1, 2, 3, 6]))
        prompt = draw(st.sampled_from(PREFIXES)) + (3,) * draw(st.integers(0, 9))
        found.append(
            Arrival(
                prompt or (4,),
                draw(st.integers(1, 24)),
                stops_after=draw(st.sampled_from([0, 1, 3, 9, 99])),
                round=draw(st.sampled_from([0, 0, 0, 1, 5, 20])),
                cancel_round=draw(st.sampled_from([None, None, None, None, 2, 6, 15])),
                priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
                tenant=draw(st.sampled_from(["", "a", "b"])),
                salt=draw(st.sampled_from(["", "", "", "s"])),
                ignores_eos=draw(st.booleans()),
                n=n,
                beam_width=draw(st.sampled_from([0, 0, 0, max(2, n), n + 2])),
                pin_rounds=draw(st.sampled_from([0, 0, 0, 3, 1000])),
            )
        )
    return found


def blocks_needed(arrival: Arrival, block_size: int) -> int:
    """Beams must fit at once, each with a block that is being copied, where they share nothing but the prompt."""
    num_tokens = len(arrival.prompt) + arrival.max_tokens - 1
    if not arrival.beam_width:
        return -(-num_tokens // block_size)
    num_shared = len(arrival.prompt) // block_size
    return num_shared + arrival.beam_width * (-(-(num_tokens - num_shared * block_size) // block_size) + 1)


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    """The largest request just fits, or there is more room; the worker may be narrow, and Redis far away."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    requests = draw(arrivals())
    largest = max(blocks_needed(request, block_size) for request in requests)
    limits = SimLimits(
        num_blocks=largest + draw(st.integers(0, 12)),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 7, 16, 64])),
        overcommit=draw(st.sampled_from([0.5, 1.0, 3.0, 100.0])),
        lookahead=draw(st.integers(2, 9)),
        ack_rounds=draw(st.integers(0, 4)),
        plans_ahead=draw(st.sampled_from([1, 2])),
        steps_per_plan=draw(st.sampled_from([1, 1, 3, 8])),
        num_host_blocks=draw(st.sampled_from([0, 1, 12, 40, 200])),
        preemption=draw(st.sampled_from(list(Preemption))),
        swap_rounds=draw(st.sampled_from([0, 1, 1, 2, 6])),
        max_pinned_blocks=draw(st.sampled_from([0, 3, 100])),
    )
    return Simulation(limits, requests)


def test_everything_ends_with_exactly_its_tokens() -> None:
    met: Counter[str] = Counter()

    @settings(max_examples=NUM_EXAMPLES, deadline=None)
    @given(simulations())
    def runs(simulation: Simulation) -> None:
        counters = simulation.run().planner.counters
        met["preemptions"] += counters.num_preemptions
        met["hits"] += counters.num_prefix_hit_tokens > 0
        met["copies"] += sum(len(plan.copy_src_block_ids) for round_ in simulation.rounds for plan, _ in round_.plans)
        met["forks"] += sum(len(round_.changes.fork) for round_ in simulation.rounds)
        met["host hits"] += counters.num_host_hit_tokens > 0
        met["blocks out"] += simulation.planner.swapper.num_blocks_out
        met["blocks in"] += simulation.planner.swapper.num_blocks_in
        met["plans of several steps"] += sum(plan.num_steps > 1 for r in simulation.rounds for plan, _ in r.plans)
        met["pins"] += sum(len(record) > 0 for round_ in simulation.rounds for _, record in round_.changes.pin)
        met["runs"] += 1

    runs()
    others = ", ".join(
        f"{met[what]} {what}" for what in ("preemptions", "forks", "copies", "blocks out", "blocks in", "pins")
    )
    print(f"\n{met['runs']} runs, {met['hits']} with hits, {met['host hits']} with some on the host, {others}")
    assert met["hits"] > met["runs"] // 10
    assert met["preemptions"] > met["runs"] // 20, "a case that no run met is not tested"
    assert met["pins"] > met["runs"] // 10, "a case that no run met is not tested"
    assert met["plans of several steps"] > met["runs"] // 4, "a case that no run met is not tested"
    assert met["host hits"] > met["runs"] // 100, "a case that no run met is not tested"
    assert met["forks"] > met["copies"] > met["runs"] // 4, "a case that no run met is not tested"
