"""Processes that die or stand still at bad moments: every stream ends whole, each token once, or says why not.

Timed workers: what a request generates is known beforehand, so that any token lost, doubled or swapped shows.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest
from pagoda.v1 import generation_pb2 as pb
from pagoda.v1 import generation_pb2_grpc

from scheduler.client import PagodaClient
from tests.stack import Received, Stack, collect, running
from tests.timed import make_timed_model, timed_request, timed_tokens

STEP_S = "0.004"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_timed_model(tmp_path_factory.mktemp("timed"))


def timed_stack(model: Path, num_workers: int = 1, *scheduler_flags: str) -> Stack:
    flags = ("--timed-step-s", STEP_S, "--num-blocks", "2000")
    return Stack(model, num_workers, ("--lease-s", "1", *scheduler_flags), flags)


class Load:
    """Resumable requests of known output, and how much of it has arrived."""

    def __init__(
        self,
        client: PagodaClient,
        num_requests: int,
        num_tokens: int,
        prompt_tokens: int = 20,
        stream_interval: int = 0,
    ) -> None:
        self.received = Received()
        self.num_tokens = num_tokens
        self.seeds = range(1, num_requests + 1)
        fields = {"resumable": True, "stream_interval": stream_interval}
        requests = [timed_request(s, num_tokens, prompt_tokens, request_id=f"r{s}", **fields) for s in self.seeds]
        self._reading = [asyncio.create_task(collect(client, request, self.received)) for request in requests]

    @property
    def num_missing(self) -> int:
        return len(self.seeds) * self.num_tokens - self.received.count

    async def share(self, share: float) -> None:
        """Waits until that share of all tokens has arrived; it must not be all."""
        await self.received.at_least(int(share * len(self.seeds) * self.num_tokens))
        assert self.num_missing > 0

    async def check(self, *, may_die: bool = False) -> None:
        """Waits for the end of all, and compares. `may_die`: some may have lost three workers, and say so."""
        results = await asyncio.wait_for(asyncio.gather(*self._reading, return_exceptions=True), 90)
        for seed, result in zip(self.seeds, results, strict=True):
            if isinstance(result, grpc.aio.AioRpcError) and may_die:
                assert "worker died 3 times" in str(result.details())
                continue
            if isinstance(result, BaseException):
                raise result
            token_ids, _, last = result
            assert token_ids == timed_tokens(seed, self.num_tokens)
            assert last.finish_reason == pb.FINISH_REASON_LENGTH
            assert last.usage.num_output_tokens == self.num_tokens


def registrations(stack: Stack, name: str) -> int:
    return stack.log(name).count(f"registered {name}")


# -- worker -----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_stood_still_comes_back_as_another(model: Path) -> None:
    async with running(timed_stack(model)) as stack, stack.client() as client:
        load = Load(client, 8, 200)
        await load.share(0.2)
        with stack.stopped("worker-0"):
            lost = await stack.until(lambda s: s.workers[0].state == pb.WORKER_STATE_LOST)
        assert lost.num_live_requests == 8
        await load.check()
        assert (await stack.idle()).workers[0].epoch > 1
        assert "REFUSED_REASON_FENCED" in stack.log("worker-0")
        assert registrations(stack, "worker-0") == 2


async def test_a_stop_shorter_than_the_lease_changes_nothing(model: Path) -> None:
    async with running(timed_stack(model)) as stack, stack.client() as client:
        load = Load(client, 4, 100)
        await load.share(0.2)
        with stack.stopped("worker-0"):
            await asyncio.sleep(0.3)  # that is the test
        await load.check()
        assert (await stack.idle()).workers[0].epoch == 1


async def test_streams_move_on_while_their_worker_stands_still(model: Path) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 200)
        await load.share(0.2)
        with stack.stopped("worker-1"):
            await load.check()
            status = await stack.status()
            states = {w.name: w.state for w in status.workers}
            assert states == {"worker-0": pb.WORKER_STATE_LIVE, "worker-1": pb.WORKER_STATE_LOST}
        await stack.ready()
        await stack.idle()
        assert (await collect(client, timed_request(99, 5)))[0] == timed_tokens(99, 5)


async def test_a_request_that_lost_its_worker_three_times_ends_with_internal(model: Path) -> None:
    async with running(timed_stack(model)) as stack, stack.client() as client:
        received = Received()
        fatal = asyncio.create_task(collect(client, timed_request(1, 8000, resumable=True), received))
        for _ in range(3):
            await received.at_least(received.count + 20)
            stack.kill("worker-0")
            stack.start_worker(0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(fatal, 30)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "worker died 3 times" in str(error.value.details())
        assert (await collect(client, timed_request(2, 5)))[0] == timed_tokens(2, 5)
        await stack.idle()


async def test_a_worker_that_never_comes_back(model: Path) -> None:
    async with running(timed_stack(model, 1, "--worker-wait-s", "1")) as stack:
        async with grpc.aio.insecure_channel(stack.address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            call = stub.Generate(timed_request(1, 8000, resumable=True))
            async for response in call:
                if response.delta.index > 10:
                    break
            stack.kill("worker-0")
            with pytest.raises(grpc.aio.AioRpcError) as running_error:
                await asyncio.wait_for(drain(call), 10)
            assert running_error.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError) as new_error:
                await asyncio.wait_for(drain(stub.Generate(timed_request(2, 5))), 10)
            assert new_error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "no worker" in str(new_error.value.details())
        stack.start_worker(0)
        await stack.ready()
        async with stack.client() as client:
            assert (await collect(client, timed_request(3, 5)))[0] == timed_tokens(3, 5)
        await stack.idle()


async def drain(call: object) -> None:
    async for _ in call:  # type: ignore[attr-defined]
        pass


async def test_a_worker_that_finds_its_name_taken_when_it_wakes(model: Path) -> None:
    """The one that came in its place keeps the name: the two do not alternate."""
    async with running(timed_stack(model)) as stack, stack.client() as client:
        load = Load(client, 4, 400)
        await load.share(0.1)
        first = stack.processes["worker-0"]
        with stack.stopped("worker-0"):
            stack.start_worker(0)
            status = await stack.until(lambda s: s.workers[0].state == pb.WORKER_STATE_LIVE and s.workers[0].epoch > 1)
            epoch = status.workers[0].epoch
            second, stack.processes["worker-0"] = stack.processes["worker-0"], first
        stack.processes["second"] = second
        await load.check()
        while "REFUSED_REASON_NAME_TAKEN" not in stack.log("worker-0"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert (await collect(client, timed_request(99, 5)))[0] == timed_tokens(99, 5)
        assert (await stack.idle()).workers[0].epoch == epoch


async def test_requests_that_come_back_to_a_worker_they_have_left(model: Path) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 500)
        for number in range(2):
            await load.share(0.1 + 0.4 * number)
            stack.kill(f"worker-{number}")
            await stack.until(lambda s: sum(w.num_running for w in s.workers) == 8)
            stack.start_worker(number)
            await stack.ready()
            assert load.num_missing > 0
        await load.check()
        await stack.idle()


async def test_worker_kills_while_requests_begin_and_end_all_the_time(model: Path) -> None:
    """An end that is being recorded when its worker dies must still reach its stream."""
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        done = Received()

        async def one_after_the_other(lane: int) -> None:
            for i in range(40):
                seed = 1000 * lane + i
                num_tokens = 1 + i % 3
                tokens, _, _ = await collect(client, timed_request(seed, num_tokens, resumable=True))
                assert tokens == timed_tokens(seed, num_tokens)
                await done.add(1)

        lanes = asyncio.gather(*(one_after_the_other(lane) for lane in range(16)))
        for turn in range(8):
            await done.at_least((turn + 1) * 60)
            stack.kill(f"worker-{turn % 2}")
            stack.start_worker(turn % 2)
        await asyncio.wait_for(lanes, 60)
        await stack.idle()


async def test_a_restarted_worker_has_nothing_cached(model: Path) -> None:
    """Its name is the same, its blocks are not: an entry of its former life would be read as garbage."""
    async with running(timed_stack(model)) as stack, stack.client() as client:
        request = timed_request(1, 5, 100)
        for cached in (0, 96):
            assert (await collect(client, request))[2].usage.num_cached_tokens == cached
        stack.kill("worker-0")
        stack.start_worker(0)
        await stack.until(lambda s: s.workers[0].state == pb.WORKER_STATE_LIVE and s.workers[0].epoch > 1)
        with stack.redis() as redis:
            assert not redis.exists("{w:worker-0}:index")
        for cached in (0, 96):
            assert (await collect(client, request))[2].usage.num_cached_tokens == cached
        await stack.idle()


# -- scheduler --------------------------------------------------------------------------------------------------------


async def test_a_scheduler_that_stood_still_goes_on(model: Path) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 200, prompt_tokens=500)
        await load.share(0.3)
        before = await stack.status()
        with stack.stopped("scheduler"):
            await asyncio.sleep(4)  # longer than lease and pings
        await load.check()
        after = await stack.idle()
        assert sum(w.num_step_tokens for w in after.workers) - sum(w.num_step_tokens for w in before.workers) < 8 * 500


@pytest.mark.parametrize("prompt_tokens", [20, 3000])
async def test_a_new_scheduler_repeats_no_prefill(model: Path, prompt_tokens: int) -> None:
    """With long prompts the kill falls into the prefill of most of them."""
    stack = timed_stack(model, 2)
    stack.worker_flags = (*stack.worker_flags, "--max-num-batched-tokens", "64")
    num_requests, num_tokens = 8, 100
    async with running(stack), stack.client() as client:
        load = Load(client, num_requests, num_tokens, prompt_tokens)
        total = num_requests * (prompt_tokens + num_tokens - 1)  # the last token is never run
        before = await stack.until(lambda s: sum(w.num_step_tokens for w in s.workers) > total / 4)
        stack.kill("scheduler")
        stack.start_scheduler()
        await load.check()
        after = await stack.idle()
        done = [sum(w.num_step_tokens for w in status.workers) for status in (before, after)]
        assert sum(done) <= total
        assert [w.epoch for w in after.workers] == [2, 2]


async def test_a_new_scheduler_keeps_the_prefix_cache(model: Path) -> None:
    async with running(timed_stack(model)) as stack, stack.client() as client:
        request = timed_request(1, 5, 100)
        await collect(client, request)
        stack.kill("scheduler")
        stack.start_scheduler()
        assert (await collect(client, request))[2].usage.num_cached_tokens == 96
        await stack.idle()


async def test_a_scheduler_killed_while_it_accepts(model: Path) -> None:
    """Clients send the same request_id again: no request runs twice, none is refused."""
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        seed = 0
        for turn in range(4):
            accepted = Received()
            seeds = range(seed + 1, seed + 61)
            seed += 60

            async def one(seed: int, accepted: Received = accepted) -> list[int]:
                request = timed_request(seed, 3, resumable=True, request_id=f"turn-{seed}")
                return (await collect(client, request, accepted))[0]

            work = asyncio.gather(*(one(s) for s in seeds))
            await accepted.at_least(1 + 20 * turn)
            stack.kill("scheduler")
            stack.start_scheduler()
            for s, tokens in zip(seeds, await asyncio.wait_for(work, 60), strict=True):
                assert tokens == timed_tokens(s, 3)
        await stack.idle()


@pytest.mark.parametrize(
    "names",
    [("scheduler", "scheduler"), ("scheduler", "worker-0"), ("worker-0", "scheduler"), ("worker-0", "worker-0")],
    ids="-".join,
)
@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "when-ready"])
async def test_two_kills_in_a_row(model: Path, names: Iterable[str], at_once: bool) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 150)
        await load.share(0.2)
        for name in names:
            stack.kill(name)
            if name == "scheduler":
                stack.start_scheduler()
            else:
                stack.start_worker(0)
            if not at_once:
                await stack.ready()
        await load.check()
        await stack.idle()


async def test_streams_that_gather_tokens_lose_none(model: Path) -> None:
    """Their plans are longer, and a kill finds them with part of the next delta."""
    async with running(timed_stack(model)) as stack, stack.client() as client:
        load = Load(client, 8, 200, stream_interval=16)
        await load.share(0.2)
        stack.kill("scheduler")
        stack.start_scheduler()
        await load.share(0.5)
        stack.kill("worker-0")
        stack.start_worker(0)
        await load.check()
        await stack.idle()


async def test_a_scheduler_killed_while_it_moves_a_lost_workers_requests(model: Path) -> None:
    rng = random.Random(7)
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 100, 120)
        for turn in range(4):
            await load.share(0.1 + 0.2 * turn)
            stack.kill(f"worker-{turn % 2}")
            await asyncio.sleep(rng.uniform(0, 0.03))  # somewhere in the move
            stack.kill("scheduler")
            stack.start_scheduler()
            if turn % 2:
                stack.start_worker(0)
                stack.start_worker(1)
            await stack.ready(1)
        await load.check()
        await stack.idle()


async def test_requests_whose_client_can_not_come_back_end_with_the_scheduler(model: Path) -> None:
    """The next one aborts what is not resumable, and keeps what is."""
    async with running(timed_stack(model)) as stack:
        async with grpc.aio.insecure_channel(stack.address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            calls = [stub.Generate(timed_request(i, 3000, request_id=f"r{i}", resumable=i == 0)) for i in range(4)]
            for call in calls:
                async for response in call:
                    if response.delta.index > 10:
                        break
            stack.kill("scheduler")
            stack.start_scheduler()
        await stack.until(lambda s: [w.num_running for w in s.workers] == [1])
        async with stack.client() as client:
            await client.cancel("r0")
            for i in range(4):
                deltas = [delta async for delta in client.attach(f"r{i}")]
                tokens = [token_id for delta in deltas for token_id in delta.token_ids]
                assert deltas[-1].finish_reason == pb.FINISH_REASON_ABORT
                assert len(tokens) > 10
                assert tokens == timed_tokens(i, 3000)[: len(tokens)]
        await stack.idle()


@pytest.mark.parametrize("names", [("scheduler",), ("worker-0",), ("worker-0", "worker-1", "scheduler")], ids="-".join)
async def test_processes_that_are_asked_to_end_lose_nothing(model: Path, names: Iterable[str]) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 200)
        await load.share(0.2)
        for name in names:
            stack.kill(name, signal.SIGTERM)
            stack.processes[name].wait(5)
        for name in names:
            if name == "scheduler":
                stack.start_scheduler()
            else:
                stack.start_worker(int(name[-1]))
        await load.check()
        await stack.idle()
        assert "Traceback" not in stack.log("scheduler") + stack.log("worker-0")


# -- Redis ------------------------------------------------------------------------------------------------------------


async def test_redis_killed_again_and_again(model: Path) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 16, 300)
        for turn in range(4):
            await load.share(0.1 + 0.2 * turn)
            stack.kill("redis")
            stack.start_redis()
        await load.check()
        status = await stack.idle()
        assert [w.epoch for w in status.workers] == [1, 1], "ownership was lost"


async def test_a_redis_that_stood_still(model: Path) -> None:
    """Longer than a reply may take: what was sent is sent again, and counted once."""
    async with running(timed_stack(model)) as stack, stack.client() as client:
        load = Load(client, 8, 200)
        await load.share(0.3)
        with stack.stopped("redis"):
            await asyncio.sleep(2.5)
        await load.check()
        assert (await stack.idle()).workers[0].epoch == 1


@pytest.mark.parametrize("name", ["worker-0", "scheduler"])
async def test_a_process_that_dies_while_redis_is_away(model: Path, name: str) -> None:
    async with running(timed_stack(model, 2)) as stack, stack.client() as client:
        load = Load(client, 8, 200)
        await load.share(0.2)
        stack.kill("redis")
        stack.kill(name)
        if name == "scheduler":
            stack.start_scheduler()
        else:
            stack.start_worker(0)
        await asyncio.sleep(0.5)  # so that it finds nobody
        stack.start_redis()
        await load.check()
        await stack.idle()


async def test_a_storm(model: Path) -> None:
    """Everything dies in turn, at random moments, under clients that come and go."""
    rng = random.Random(11)
    async with running(timed_stack(model, 3)) as stack, stack.client() as client:
        load = Load(client, 60, 400)
        for turn in range(10):
            await load.share(0.07 * (turn + 1))
            name = rng.choice(("worker-0", "worker-1", "worker-2", "scheduler", "redis"))
            stack.kill(name)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(load.received.at_least(10**9), rng.uniform(0, 0.3))
            if name == "redis":
                stack.start_redis()
            elif name == "scheduler":
                stack.start_scheduler()
            else:
                stack.start_worker(int(name[-1]))
        await load.check(may_die=True)
        await stack.idle()
