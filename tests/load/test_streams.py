"""`make bench-streams` for a second."""

from pathlib import Path

from tests.load.bench_streams import Case, make_model, run


async def test_every_token_has_an_age(tmp_path: Path) -> None:
    case = Case(num_streams=8, step_s=0.01)
    found = await run(case, make_model(tmp_path), 1.0)
    assert 0 < found.messages_per_s < found.tokens_per_s < 2 * case.asked_tokens_per_s
    assert 0 < found.delay_p50_ms <= found.delay_p99_ms
    assert {"scheduler", "redis", "worker", "client"} <= set(found.cores)
    assert 0 < found.engine_cores + found.delivery_cores <= found.cores["scheduler"]
