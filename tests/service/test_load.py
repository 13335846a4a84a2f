"""Many at once: shared prefixes, leavers, slow readers, full queues, priorities and tenants. Counted, not guessed."""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.load.harness.pagoda_backend import retry_after_s
from tests.service.calls import Stub, begun, failure
from tests.stack import Stack, collect, running, started
from tests.timed import timed_request, timed_tokens

DOCUMENTED_KEYS = {b"pagoda:workers", b"pagoda:seq_id_prefix"} | {
    f"{{w:worker-{number}}}:{part}".encode() for number in range(2) for part in ("meta", "pool", "index")
}
"""What keys.py says stays behind after a run."""


@pytest.fixture(scope="module")
def pair(timed_model: Path) -> Iterator[Stack]:
    """Two workers, and records that are soon forgotten."""
    flags = ("--timed-step-s", "0.001", "--num-blocks", "2000", "--max-num-seqs", "64")
    with started(Stack(timed_model, 2, ("--record-ttl-s", "1", "--lease-s", "1"), flags)) as stack:
        yield stack


@pytest.fixture
async def stack(pair: Stack) -> AsyncIterator[Stack]:
    yield pair
    await pair.idle()


async def forgotten(stack: Stack) -> None:
    """Waits until Redis holds nothing but the documented keys; DBSIZE counts expired ones until they are collected."""
    deadline_s = time.monotonic() + 10
    with stack.redis() as redis:
        while redis.dbsize() > len(DOCUMENTED_KEYS) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert set(redis.keys()) <= DOCUMENTED_KEYS
        assert redis.dbsize() <= len(DOCUMENTED_KEYS)


# -- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_batched_tokens", [256, 4096])
async def test_a_prefix_of_64_requests_at_once_is_prefilled_once_per_worker(
    timed_model: Path, num_batched_tokens: int
) -> None:
    num_requests, prefix_tokens, own_tokens, num_tokens = 64, 1024, 10, 8
    flags = ("--timed-step-s", "0.002", "--num-blocks", "2000", "--max-num-batched-tokens", str(num_batched_tokens))
    prefix = list(timed_request(1, 1, prefix_tokens).token_ids.ids)
    async with running(Stack(timed_model, 2, worker_flags=flags)) as stack, stack.client() as client:
        requests = [timed_request(seed, num_tokens, own_tokens) for seed in range(100, 100 + num_requests)]
        for request in requests:
            request.token_ids.ids[:] = prefix + list(request.token_ids.ids)
        results = await asyncio.gather(*(collect(client, request) for request in requests))
        workers = (await stack.idle()).workers
    for seed, (token_ids, _, _) in enumerate(results, 100):
        assert token_ids == timed_tokens(seed, num_tokens)
    num_used = sum(w.num_output_tokens > 0 for w in workers)
    assert num_used >= 1
    # Each prompt's own tokens and each output but its last are run once; the prefix once by each worker.
    expected = num_requests * (own_tokens + num_tokens - 1) + num_used * prefix_tokens
    assert sum(w.num_step_tokens for w in workers) == expected
    assert sum(r[2].usage.num_cached_tokens for r in results) == (num_requests - num_used) * prefix_tokens


async def test_one_salts_prefix_is_no_hit_for_another(stack: Stack) -> None:
    async with stack.client() as client:
        for salt, cached in (("a", 0), ("a", 96), ("b", 0), ("", 0), ("ab", 0), ("a", 96)):
            request = timed_request(2, 3, 100, cache_salt=salt)
            assert (await collect(client, request))[2].usage.num_cached_tokens == cached


@pytest.mark.parametrize("overcommit", ["1", "8"])
async def test_prompts_that_nearly_fill_the_pool_all_get_through(timed_model: Path, overcommit: str) -> None:
    """In small chunks: prefills that are half done must not hold all blocks and wait for each other."""
    flags = ("--timed-step-s", "0", "--num-blocks", "20", "--max-num-batched-tokens", "32")
    stack = Stack(timed_model, 1, ("--overcommit", overcommit), flags)
    async with running(stack), stack.client() as client:
        seeds = range(1, 13)
        requests = [timed_request(seed, 30, 200 + 7 * seed) for seed in seeds]
        results = await asyncio.wait_for(asyncio.gather(*(collect(client, r) for r in requests)), 30)
        assert [token_ids for token_ids, _, _ in results] == [timed_tokens(seed, 30) for seed in seeds]
        await stack.idle()


# -- leavers ----------------------------------------------------------------------------------------------------------


async def test_a_hundred_cancels_and_disconnects_in_mid_stream(stack: Stack) -> None:
    """At random moments, from before the request is accepted to after its end."""
    rng = random.Random(3)

    async def one(number: int, stub: Stub) -> None:
        resumable = number % 3 == 0
        request = timed_request(
            1000 + number, rng.choice((5, 50, 3000)), rng.choice((1, 40, 500)), request_id=f"x{number}"
        )
        request.resumable, request.resume_wait_s = resumable, 0.05 * resumable
        call = stub.Generate(request)
        await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01, 0.1)) * rng.random())
        if number % 2:
            with contextlib.suppress(AssertionError):  # it was short, and has ended
                await begun(call, rng.choice((1, 2, 30)))
        if number % 5 == 0:
            with contextlib.suppress(grpc.aio.AioRpcError):  # it is not accepted yet
                await stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        call.cancel()

    rss_bytes = {name: stack.rss_bytes(name) for name in ("scheduler", "worker-0", "worker-1")}
    for turn in range(2):
        async with grpc.aio.insecure_channel(stack.address) as channel:
            stub = Stub(channel)
            await asyncio.gather(*(one(100 * turn + number, stub) for number in range(100)))
            status = await stack.idle()
        for worker in status.workers:
            assert worker.num_free_blocks + worker.num_cached_blocks == worker.num_blocks == 2000
            assert worker.epoch == 1
        await forgotten(stack)
        if turn == 0:
            rss_bytes = {name: stack.rss_bytes(name) for name in rss_bytes}
    for name, before in rss_bytes.items():
        assert stack.rss_bytes(name) - before < 16 << 20, name


async def test_what_every_kind_of_end_leaves_behind_is_what_is_documented(stack: Stack) -> None:
    async with stack.client() as client:
        for number in range(5):
            await collect(client, timed_request(3000 + number, 20, 50, resumable=bool(number % 2)))
        eternal = asyncio.create_task(collect(client, timed_request(3010, 4000, request_id="cancelled")))
        await stack.until(lambda s: s.num_live_requests == 1)
        await client.cancel("cancelled")
        await eternal
        await failure(Stub(client._channel).Generate(pb.GenerateRequest(text="")))
    await stack.idle()
    await forgotten(stack)


# -- slow readers -----------------------------------------------------------------------------------------------------


async def test_a_reader_that_stalls_costs_little_and_delays_nobody(stack: Stack) -> None:
    """It reads one message and stops, with thousands of tokens to come."""
    num_slow, num_tokens = 4, 3000
    # A small window, and a connection of its own: what is not read soon waits in the service.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(stack.address, options=options) as channel, stack.client() as client:
        stub = Stub(channel)
        names = [f"{i}".ljust(128, "x") for i in range(num_slow)]  # long, so that few messages fill the connection
        stalled = [stub.Generate(timed_request(4000 + i, num_tokens, request_id=n)) for i, n in enumerate(names)]
        for call in stalled:
            await begun(call)
        before_bytes = stack.rss_bytes("scheduler")
        began_s = time.monotonic()
        assert (await collect(client, timed_request(4100, 200)))[0] == timed_tokens(4100, 200)
        assert time.monotonic() - began_s < 60, "it waited for the slow ones"
        await stack.until(lambda s: all(w.num_running == 0 for w in s.workers))  # they did not hold the workers up
        grown_bytes = stack.rss_bytes("scheduler") - before_bytes
        assert grown_bytes < num_slow * num_tokens * 100 + (8 << 20)
        for i, call in enumerate(stalled):
            token_ids, longest = [], 0
            async for response in call:
                token_ids += response.delta.token_ids
                longest = max(longest, len(response.delta.token_ids))
            assert longest >= 100, "the service kept a message per token for it"
            assert token_ids == timed_tokens(4000 + i, num_tokens)[-len(token_ids) :]
            assert len(token_ids) >= num_tokens - 100


# -- who is next ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def narrow(timed_model: Path) -> AsyncIterator[Stack]:
    """One sequence at a time, so that the order shows."""
    flags = ("--timed-step-s", "0.002", "--num-blocks", "500", "--max-num-seqs", "1")
    async with running(Stack(timed_model, 1, ("--max-waiting", "30"), flags)) as stack:
        yield stack


@contextlib.asynccontextmanager
async def occupied(client: PagodaClient, stack: Stack) -> AsyncIterator[None]:
    """A request runs meanwhile, however long it takes to send others."""
    first = asyncio.create_task(collect(client, timed_request(1, 6000, request_id="first")))
    await stack.until(lambda s: s.workers[0].num_running == 1)
    yield
    assert await client.cancel("first")
    await first


async def order_of(client: PagodaClient, stack: Stack, requests: dict[str, pb.GenerateRequest]) -> list[str]:
    """Names of requests, sent in order behind one that runs, in the order in which they end."""
    ended: list[str] = []

    async def one(name: str, request: pb.GenerateRequest) -> None:
        await collect(client, request)
        ended.append(name)

    tasks = []
    async with occupied(client, stack):
        for number, (name, request) in enumerate(requests.items(), 1):
            tasks.append(asyncio.create_task(one(name, request)))
            await stack.until(lambda s, number=number: s.workers[0].num_waiting == number)
    await asyncio.gather(*tasks)
    return ended


async def test_priority_goes_before_arrival(narrow: Stack) -> None:
    async with narrow.client() as client:
        requests = {f"{p} {i}": timed_request(10 + 3 * p + i, 5, priority=p) for i in range(2) for p in (2, 0, -1)}
        assert await order_of(client, narrow, requests) == ["-1 0", "-1 1", "0 0", "0 1", "2 0", "2 1"]


async def test_tenants_take_turns(narrow: Stack) -> None:
    async with narrow.client() as client:
        greedy = {f"many {i}": timed_request(100 + i, 5, 50, tenant="many") for i in range(8)}
        modest = {f"few {i}": timed_request(200 + i, 5, 50, tenant="few") for i in range(2)}
        order = await order_of(client, narrow, {**greedy, **modest})
        assert max(order.index("few 0"), order.index("few 1")) < 5, order
        assert [name for name in order if name.startswith("many")] == list(greedy)


async def test_a_full_queue_refuses_and_serves_again(narrow: Stack) -> None:
    async with narrow.client() as client:
        requests = [timed_request(300 + i, 5, request_id=f"r{i}") for i in range(100)]
        async with occupied(client, narrow):
            tasks = [asyncio.create_task(collect(client, request)) for request in requests]
            for refused_one in itertools.islice(asyncio.as_completed(tasks), 70):
                with contextlib.suppress(grpc.RpcError):
                    await refused_one
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
        served = [(i, r) for i, r in enumerate(results) if not isinstance(r, BaseException)]
        assert len(refused) + len(served) == 100
        assert len(served) == 30
        assert all(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for error in refused)
        assert all(token_ids == timed_tokens(300 + i, 5) for i, (token_ids, _, _) in served)
        assert (await collect(client, requests[-1]))[0] == timed_tokens(399, 5)
        await narrow.idle()


async def test_who_finds_the_queue_full_is_told_when_to_come_back_and_then_gets_in(timed_model: Path) -> None:
    """One at a time, a tenth of a second each: the k-th one that is refused is told k tenths of a second, or so."""
    flags = ("--timed-step-s", "0.005", "--num-blocks", "500", "--max-num-seqs", "1")
    stack = Stack(timed_model, 1, ("--max-waiting", "8"), flags)
    told_s: list[float] = []
    async with running(stack), stack.client() as client:

        async def insist(seed: int) -> int:
            """Comes back when it is told to; how often it came."""
            for attempt in range(1, 20):
                [result] = await asyncio.gather(collect(client, timed_request(seed, 20)), return_exceptions=True)
                if not isinstance(result, BaseException):
                    assert result[0] == timed_tokens(seed, 20)
                    return attempt
                assert isinstance(result, grpc.aio.AioRpcError)
                assert result.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                delay_s = retry_after_s(result)
                assert f"try again {'later' if delay_s is None else f'in {delay_s:.1f} s'}" in str(result.details())
                told_s.append(delay_s or 0.5)
                await asyncio.sleep(told_s[-1])
            raise AssertionError("it never got in")

        keeping_full = [asyncio.create_task(insist(seed)) for seed in range(500, 512)]
        await asyncio.sleep(0.7)  # some have left the queue by now: there is a pace to tell
        began_s = time.monotonic()
        attempts = await asyncio.gather(*(insist(seed) for seed in range(600, 640)), *keeping_full)
        took_s = time.monotonic() - began_s
        await stack.idle()
    assert max(told_s) > 20 * 0.1, "all at once"
    assert sum(attempts) / len(attempts) < 4, "most were told too little"
    assert took_s < 2.5 * 52 * 0.11, "most were told too much"
