"""What Prometheus reads from scheduler and worker, held against what really happened; logs for machines."""

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.client import PagodaClient
from tests.service.calls import failure
from tests.stack import Stack, collect, free_port, running
from tests.timed import timed_request

ROOT = Path(__file__).parents[2]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    """Of scheduler and worker."""
    return free_port(), free_port()


@pytest.fixture
async def stack(timed_model: Path, ports: tuple[int, int]) -> AsyncIterator[Stack]:
    scheduler, worker = (("--metrics-listen", f"127.0.0.1:{port}") for port in ports)
    flags = ("--timed-step-s", "0.002", "--num-blocks", "50", *worker)
    async with running(Stack(timed_model, scheduler_flags=scheduler, worker_flags=flags)) as stack:
        yield stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[PagodaClient]:
    async with stack.client() as client:
        yield client


async def scrape(port: int) -> Samples:
    """Every sample, by name and labels."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            return str(response.read().decode())

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"pagoda:{name}", tuple(sorted(labels.items()))]


async def test_the_scheduler_counts_what_its_clients_saw(
    stack: Stack, client: PagodaClient, ports: tuple[int, int]
) -> None:
    await asyncio.gather(*(collect(client, timed_request(seed, 10, 40)) for seed in range(5)))
    await collect(client, timed_request(1, 10, 40))
    await collect(client, timed_request(9, 3, 40, n=1))
    await stack.idle()
    samples = await scrape(ports[0])
    assert of(samples, "generation_tokens_total") == 63
    assert of(samples, "prompt_tokens_total") == 7 * 40
    assert of(samples, "request_success_total", finished_reason="length") == 7
    for name, count in (
        *(("time_to_first_token_seconds", 7), ("e2e_request_latency_seconds", 7)),
        *(("request_queue_time_seconds", 7), ("request_prefill_time_seconds", 7), ("request_decode_time_seconds", 7)),
        *(("request_prompt_tokens", 7), ("request_generation_tokens", 7)),
    ):
        assert of(samples, f"{name}_count") == count, name
    assert 0 < of(samples, "inter_token_latency_seconds_count") <= 56  # tokens logged at once have no time between them
    between_s = of(samples, "inter_token_latency_seconds_sum")
    assert between_s == pytest.approx(of(samples, "request_decode_time_seconds_sum"))
    first_s, whole_s = (of(samples, f"{name}_seconds_sum") for name in ("time_to_first_token", "e2e_request_latency"))
    assert 0 < first_s < first_s + between_s < whole_s
    (status,) = (await client.get_status()).workers
    labels = {"worker": "worker-0"}
    assert of(samples, "worker_up", **labels) == 1
    assert of(samples, "worker_epoch", **labels) == status.epoch
    assert of(samples, "prefix_cache_queries_total", **labels) == status.num_prefix_query_tokens
    assert of(samples, "prefix_cache_hits_total", **labels) == status.num_prefix_hit_tokens == 32
    assert of(samples, "steps_total", **labels) == status.num_steps
    for state, count in (("free", status.num_free_blocks), ("referenced", 0), ("cached", status.num_cached_blocks)):
        assert of(samples, "blocks", state=state, **labels) == count
    assert of(samples, "kv_cache_usage_perc", **labels) == 0
    assert of(samples, "iteration_tokens_total_sum", **labels) == status.num_step_tokens
    assert of(samples, "step_phase_seconds_total", phase="plan", **labels) > 0


async def test_the_worker_counts_its_steps(stack: Stack, client: PagodaClient, ports: tuple[int, int]) -> None:
    await collect(client, timed_request(1, 20, 40))
    (status,) = (await stack.idle()).workers
    samples = {name: value for (name, _), value in (await scrape(ports[1])).items()}
    assert samples["pagoda_worker:step_seconds_count"] == status.num_steps
    assert samples["pagoda_worker:sampled_tokens_total"] >= 20
    assert samples["pagoda_worker:epoch"] == status.epoch


async def test_failures_are_counted_by_their_status(stack: Stack, client: PagodaClient, ports: tuple[int, int]) -> None:
    await failure(client.generate(timed_request(1, 1, adapter="a")))
    await failure(client.explain("nobody"))
    samples = await scrape(ports[0])
    assert of(samples, "request_errors_total", status="UNIMPLEMENTED") == 1
    assert of(samples, "request_errors_total", status="NOT_FOUND") == 1


async def test_a_lost_worker_is_down(stack: Stack, client: PagodaClient, ports: tuple[int, int]) -> None:
    stack.kill("worker-0")
    await stack.until(lambda status: status.workers[0].state != 1)
    samples = await scrape(ports[0])
    assert of(samples, "worker_up", worker="worker-0") == 0
    assert ("pagoda:blocks", (("state", "free"), ("worker", "worker-0"))) not in samples


async def test_every_query_of_the_dashboard_asks_for_what_there_is(
    stack: Stack, client: PagodaClient, ports: tuple[int, int]
) -> None:
    await collect(client, timed_request(1, 5, 40))
    names = {name for port in ports for name, _ in await scrape(port)}
    dashboard = json.loads((ROOT / "deploy/grafana/pagoda.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 10
    for query in queries:
        asked = set(re.findall(r"pagoda\w*:\w+", query))
        assert asked, query
        assert asked <= names | {"pagoda:request_errors_total"}, query


def a_scheduler(stack: Stack, **environment: str) -> "subprocess.Popen[str]":
    """A process of its own, with an environment of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", **environment}
    command = [sys.executable, "-m", "scheduler", *stack.scheduler_argv()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


async def test_an_address_in_use_stops_the_start(timed_model: Path, ports: tuple[int, int], stack: Stack) -> None:
    second = Stack(timed_model, redis_url=f"unix://{stack.redis_socket}", scheduler_flags=stack.scheduler_flags)
    process = a_scheduler(second)
    _, said = await asyncio.to_thread(process.communicate, timeout=60)
    second.close()
    assert process.returncode == 2
    assert said.splitlines()[0].startswith(f"scheduler: --metrics-listen=127.0.0.1:{ports[0]}: ")


async def test_logs_for_machines_are_an_object_a_line_and_hold_no_secret(timed_model: Path) -> None:
    stack = Stack(timed_model, worker_flags=("--timed-step-s", "0.002"))
    stack.start_redis()
    stack.start_worker(0)
    process = a_scheduler(stack, PAGODA_LOG_FORMAT="json")
    try:
        await stack.ready()
        async with stack.client() as client:
            await collect(client, timed_request(1, 4, 40, request_id="one", cache_salt="hush", tenant="t"))
            await failure(client.generate(timed_request(1, 1, request_id="one")))
        process.terminate()
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
        stack.close()
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["process"] for line in lines} == {"scheduler"}
    assert [line["worker"] for line in lines if "is live" in line["message"]] == ["worker-0"]
    (end,) = (line for line in lines if line.get("request_id") == "one")
    assert (end["finish_reason"], end["num_prompt_tokens"], end["num_output_tokens"]) == ("length", 40, 4)
    assert 0 < end["seconds"] < 30
    assert "hush" not in said
