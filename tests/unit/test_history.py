"""What is remembered for `pagoda explain`, and how much of it."""

from typing import cast

from pagoda.v1 import generation_pb2 as pb

from scheduler.block_states import BlockState
from scheduler.explain import MAX_ENDED, Explanation, Explanations
from scheduler.history import MAX_ADMISSIONS, MAX_EVICTIONS, MAX_RUNS, PoolHistory
from scheduler.live_request import LiveChoice, LiveRequest
from scheduler.request import RequestBody
from scheduler.sequence import Admission, BlockSource, EvictedRun, Sequence, SequenceLimits
from tests.unit.traffic import Pool, prompts

HIT, COMPUTED, EVICTED, LAST, HOST_HIT = BlockSource


def served(pool: Pool, prompt: list[int], now_s: float) -> Sequence:
    """A request, from its arrival to its end."""
    pool.planner.history.now_s = now_s
    sequence = pool.open(prompt)
    pool.finish()
    return sequence


def test_names_and_numbers_are_those_of_the_contract() -> None:
    assert {f"BLOCK_SOURCE_{s.name}": s.value for s in BlockSource} == dict(pb.BlockSource.items()[1:])
    assert {f"BLOCK_STATE_{s.name}": s.value for s in BlockState} == dict(pb.BlockState.items()[1:])


def test_hits_come_first_then_what_is_computed_and_the_last_token_always() -> None:
    pool = Pool(32)
    pool.planner.history.worker = "worker-0"
    first = served(pool, [1] * 40, 5.0)
    assert first.admissions == [Admission("worker-0", 5.0, 0, bytes([COMPUTED, COMPUTED, LAST]), ())]
    assert served(pool, [1] * 16 + [2] * 32, 6.0).admissions[0].sources == bytes([HIT, COMPUTED, LAST])
    assert served(pool, [1] * 16, 7.0).admissions[0].sources == bytes([LAST])
    assert served(pool, [3], 7.0).admissions[0].sources == bytes([LAST])


def test_a_miss_that_once_was_cached_names_who_took_the_blocks_and_when() -> None:
    pool = Pool(20)
    victim = [1] * 161
    served(pool, victim, 1.0)
    thieves = [served(pool, prompt, 2.0 + i) for i, prompt in enumerate(([2] * 176, [3] * 128))]
    again = served(pool, victim, 9.0).admissions[0]
    assert again.at_s == 9.0
    assert again.sources == bytes([EVICTED] * 10 + [LAST])
    second, first = again.evicted
    assert second == EvictedRun(0, second.num_blocks, (3.0, thieves[1].request_id))
    assert first == EvictedRun(second.num_blocks, 10 - second.num_blocks, (2.0, thieves[0].request_id))
    assert 0 < first.num_blocks < 10, "the tail goes first"


def test_who_is_admitted_later_in_one_step_is_told_of_the_evictions_before() -> None:
    pool = Pool(20, overcommit=100.0)
    served(pool, [1] * 161, 1.0)
    thief, victim = pool.open([2] * 200), pool.open([1] * 65)
    pool.finish()
    assert victim.admissions[0].sources.count(HIT) + victim.admissions[0].sources.count(EVICTED) == 4
    assert {run.eviction[1] for run in victim.admissions[0].evicted} <= {thief.request_id}


def test_every_eviction_is_counted() -> None:
    pool = Pool(20)
    pool.serve(prompts(1, 10, 10))
    assert pool.planner.history.num_evictions == 10 * 10 - pool.blocks.num_cached_blocks
    assert pool.blocks.evicted_hashes == []


def admitted(history: PoolHistory, hashes: list[bytes]) -> Sequence:
    """A sequence of which nothing is a hit."""
    sequence = Sequence(
        1, "r1", 0, [1] * (16 * len(hashes) + 1), 16 * len(hashes) + 1, SequenceLimits(1, frozenset(), True), b""
    )
    sequence.block_hashes = hashes
    history.note_admission(sequence, [])
    return sequence


def test_only_the_last_evictions_are_remembered() -> None:
    history = PoolHistory(16)
    hashes = [b"%d" % i for i in range(MAX_EVICTIONS + 1)]
    history.note_evictions(list(hashes), "thief")
    assert admitted(history, hashes[:2]).admissions[0].sources == bytes([COMPUTED, EVICTED, LAST])
    assert len(history._evictions) == MAX_EVICTIONS
    history.note_evictions([hashes[1], b"new"], "thief")
    assert admitted(history, hashes[1:3]).admissions[0].sources == bytes([EVICTED, COMPUTED, LAST])


def test_an_admission_has_so_many_runs_and_no_more() -> None:
    history = PoolHistory(16)
    hashes = [b"%d" % i for i in range(2 * MAX_RUNS)]
    for i, hash_ in enumerate(hashes):
        history.note_evictions([hash_], f"thief-{i}")
    admission = admitted(history, hashes).admissions[0]
    assert admission.sources == bytes([EVICTED] * 2 * MAX_RUNS + [LAST])
    assert [run.first_block for run in admission.evicted] == list(range(MAX_RUNS))


def test_of_many_admissions_the_first_and_the_last_are_kept() -> None:
    pool = Pool(64, max_num_batched_tokens=16)
    sequence = pool.open([1] * 320)
    for _ in range(9):
        pool.step()
        pool.planner._preempt(sequence)
        pool.planner.removed.clear()
    pool.finish()
    assert [a.attempt for a in sequence.admissions] == [0, *range(10 - MAX_ADMISSIONS + 1, 10)]
    assert sequence.admissions[0].sources.count(HIT) == 0
    assert sequence.admissions[-1].sources.count(HIT) > 0


def live(request_id: str, sequence: Sequence) -> LiveRequest:
    """Only its name counts."""
    body = cast(RequestBody, type("Body", (), {"request_id": request_id})())
    request = LiveRequest(body)
    request.choices = [LiveChoice(request, sequence)]
    return request


def test_so_many_ended_requests_are_kept_and_the_oldest_goes() -> None:
    explanations = Explanations()
    sequence = served(Pool(8), [1] * 20, 1.0)
    for i in range(MAX_ENDED + 1):
        explanations.keep(live(f"r{i}", sequence))
    assert explanations.get("r0") is None
    assert explanations.get("r1") == Explanation(20, True, tuple(sequence.admissions))
    assert len(explanations._ended) == MAX_ENDED


def test_who_was_admitted_by_an_earlier_scheduler_is_known_to_be_forgotten() -> None:
    sequence = Pool(8).open([1] * 20)
    assert not Explanation.of(live("waits", sequence)).is_forgotten
    sequence.num_cached_tokens = 0
    assert Explanation.of(live("was admitted", sequence)).is_forgotten
