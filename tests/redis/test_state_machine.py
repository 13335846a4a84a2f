"""Thousands of random operations on the block manager and its scripts, on real servers (see pool_machine).

Covers, of the traps that others fell into: a stale hash left on a reused block, a hash published before its block is
written, a hit evicted between look-up and reservation, a result applied to the next life of a preempted sequence, and
entries of a dead incarnation that stay in the index.
"""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.redis.pool_machine import PoolMachine, events
from tests.redis_servers import RedisServer

IS_LONG = os.environ.get("PAGODA_TEST_LONG") == "1"
NUM_STEPS = 400
NUM_MACHINES = {"valkey": 22, "redis6": 3, "redis": 3}
MUST_HAPPEN = (
    "admissions",
    "readmissions",
    "hits",
    "evictions",
    "copies",
    "swaps out",
    "swaps in",
    "hits on the host",
    "swaps of an earlier owner",
    "branches",
    "pins",
    "pins that ended",
    "preemptions with a plan in flight",
    "rows of an earlier attempt",
    "rows of ended sequences",
    "results from an earlier owner's time",
    "seizures with scripts in flight",
    "dead incarnations",
    "resent after a lost reply",
    "answers done",
    "answers GAP",
    "answers STALE",
    "answers REFUSED",
    "the live mirror rebuilt",
)
"""A case that no machine met is not tested."""
MUST_HAPPEN_IN_LONG_RUNS = (
    "contents that the host lost",
    "adopted while blocks arrive",
    "preemptions while blocks arrive",
)


def test_mirror_and_redis_agree_whatever_happens(server: RedisServer) -> None:
    events.clear()
    run_state_machine_as_test(
        type("ServedPoolMachine", (PoolMachine,), {"server": server}),
        settings=settings(
            max_examples=NUM_MACHINES[server.kind] * (10 if IS_LONG else 1),
            stateful_step_count=NUM_STEPS,
            deadline=None,
            phases=[Phase.generate],  # shrinking takes minutes; the failing operations are printed as they are
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
    print(f"\n{server.kind}:", ", ".join(f"{count} {name}" for name, count in sorted(events.items())))
    if server.kind == "valkey":
        expected = MUST_HAPPEN + (MUST_HAPPEN_IN_LONG_RUNS if IS_LONG else ())
        assert [name for name in expected if not events[name]] == []
