"""Workers that may not serve are told the difference; workers that break the contract are lost, and hurt nobody."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from pagoda import PROTOCOL_VERSION
from pagoda.fingerprint import model_fingerprint
from pagoda.v1 import generation_pb2 as gpb
from pagoda.v1 import worker_pb2 as pb
from pagoda.v1 import worker_pb2_grpc

from tests.stack import Stack, collect, started
from tests.timed import MAX_MODEL_LEN, timed_request, timed_tokens

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def own_stack(timed_model: Path) -> Iterator[Stack]:
    flags = ("--timed-step-s", "0.002", "--num-blocks", "200")
    with started(Stack(timed_model, 1, ("--lease-s", "1"), flags)) as stack:
        yield stack


@pytest.fixture
async def stack(own_stack: Stack) -> AsyncIterator[Stack]:
    """Whatever was refused: the worker that serves goes on serving."""
    yield own_stack
    async with own_stack.client() as client:
        assert (await collect(client, timed_request(1, 3)))[0] == timed_tokens(1, 3)
    worker = next(w for w in (await own_stack.idle()).workers if w.name == "worker-0")
    assert (worker.state, worker.epoch) == (gpb.WORKER_STATE_LIVE, 1)


class FakeWorker:
    """One stream of the worker's side of the contract."""

    def __init__(self, stack: Stack) -> None:
        self._channel = grpc.aio.insecure_channel(stack.address)
        self._call = worker_pb2_grpc.WorkerLinkStub(self._channel).Connect()

    async def __aenter__(self) -> "FakeWorker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def send(self, **message: Any) -> None:
        await self._call.write(pb.ConnectRequest(**message))

    async def receive(self) -> pb.ConnectResponse | None:
        """The next message; None where the stream has ended."""
        try:
            response = await asyncio.wait_for(self._call.read(), TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        return None if response is grpc.aio.EOF else response

    async def plan(self) -> pb.StepPlan:
        response = await self.receive()
        assert response is not None
        assert response.HasField("plan")
        return response.plan

    async def beat(self) -> None:
        """Heartbeats, until the stream has ended."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self.send(heartbeat=pb.Heartbeat())
                await asyncio.sleep(0.05)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        return await self._call.code(), str(await self._call.details())


def register(stack: Stack, **changes: Any) -> pb.Register:
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "worker_name": "fake",
        "incarnation": "i1",
        "model_fingerprint": model_fingerprint(stack.model),
        "block_size": 16,
        "kv_dtype": "float32",
        "num_blocks": 100,
        "block_bytes": 1,
        "kv_groups": [pb.KVGroup(num_layers=1)],
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
        "device": "fake",
    }
    return pb.Register(**{**fields, **changes})


MISMATCHES: list[tuple[dict[str, Any], str]] = [
    ({"protocol_version": 99}, "protocol version: the worker has 99, the scheduler "),
    ({"model_fingerprint": "ab" * 16}, f"model: the worker has {'ab' * 16}, the scheduler "),
    ({"block_size": 32}, "block_size: the worker has 32, the scheduler 16"),
    ({"kv_dtype": "bfloat16"}, "KV dtype: the worker has bfloat16, the scheduler float32"),
    ({"max_model_len": 100}, "max_model_len: the worker runs 100 tokens, the scheduler serves 16384"),
    ({"worker_name": ""}, "worker name ''"),
    ({"worker_name": "a}b"}, "worker name 'a}b'"),
    ({"num_blocks": 0}, "num_blocks"),
    ({"kv_groups": [pb.KVGroup(), pb.KVGroup()]}, "KV groups: the worker has 2, the scheduler serves 1"),
]


@pytest.mark.parametrize(("changes", "words"), MISMATCHES, ids=[next(iter(c)) for c, _ in MISMATCHES])
async def test_a_worker_that_differs_is_told_how(stack: Stack, changes: dict[str, Any], words: str) -> None:
    async with FakeWorker(stack) as worker:
        await worker.send(register=register(stack, **changes))
        response = await worker.receive()
        assert response is not None
        assert response.refused.reason == pb.REFUSED_REASON_MISMATCH
        assert response.refused.detail.startswith(words), response.refused.detail
        assert await worker.receive() is None
    assert "fake" not in [w.name for w in (await stack.status()).workers]


async def test_a_second_live_worker_of_the_same_name(stack: Stack) -> None:
    async with FakeWorker(stack) as worker:
        await worker.send(register=register(stack, worker_name="worker-0"))
        response = await worker.receive()
        assert response is not None
        assert response.refused.reason == pb.REFUSED_REASON_NAME_TAKEN
        assert "worker-0" in response.refused.detail


@pytest.mark.parametrize("message", [{"heartbeat": pb.Heartbeat()}, {"result": pb.StepResult(step_id=1)}, {}], ids=str)
async def test_a_worker_that_does_not_register_first(stack: Stack, message: dict[str, Any]) -> None:
    async with FakeWorker(stack) as worker:
        await worker.send(**message)
        assert await worker.receive() is None
        code, details = await worker.status()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "register" in details


def result_of(plan: pb.StepPlan, **changes: Any) -> pb.StepResult:
    """What a worker that samples token 7 says of the first plan of one sequence."""
    computed = [a.num_computed_tokens + n for a, n in zip(plan.added, plan.num_scheduled_tokens, strict=False)]
    fields: dict[str, Any] = {
        "epoch": plan.epoch,
        "step_id": plan.step_id,
        "seq_ids": plan.scheduled_seq_ids,
        "attempts": [a.attempt for a in plan.added],
        "num_computed_tokens": computed,
        "first_output_indexes": [len(a.token_ids) - a.num_prompt_tokens for a in plan.added],
        "num_tokens": [1] * len(plan.added),
        "token_ids": [7] * len(plan.added),
        "step_s": 0.001,
    }
    return pb.StepResult(**{**fields, **changes})


WRONG: dict[str, Callable[[pb.StepPlan], pb.StepResult]] = {
    "a step that was never planned": lambda plan: result_of(plan, step_id=plan.step_id + 9),
    "fewer rows": lambda plan: pb.StepResult(epoch=plan.epoch, step_id=plan.step_id),
    "columns of different length": lambda plan: result_of(plan, num_tokens=[]),
    "fewer ids than it says": lambda plan: result_of(plan, num_tokens=[5]),
    "an index that is not due": lambda plan: result_of(plan, first_output_indexes=[3]),
    "more progress than planned": lambda plan: result_of(plan, num_computed_tokens=[5000]),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_worker_that_breaks_the_contract_is_lost_and_its_request_goes_on(stack: Stack, case: str) -> None:
    """The fake is the emptier one, so it gets the request; then the real one does."""
    first_seed = 1000 * (1 + list(WRONG).index(case))
    async with FakeWorker(stack) as worker, stack.client() as client:
        await worker.send(register=register(stack, incarnation=case))
        assert await worker.receive()
        reading = [asyncio.create_task(collect(client, timed_request(first_seed + i, 300, 300))) for i in range(2)]
        plan = await worker.plan()
        await worker.send(result=WRONG[case](plan))
        beating = asyncio.create_task(worker.beat())
        while (response := await worker.receive()) is not None:
            assert response.HasField("plan")
        beating.cancel()
        for i, task in enumerate(reading):
            assert (await asyncio.wait_for(task, TIMEOUT_S))[0] == timed_tokens(first_seed + i, 300)


async def test_results_that_come_twice_count_once(stack: Stack) -> None:
    async with FakeWorker(stack) as worker, stack.client() as client:
        await worker.send(register=register(stack, incarnation="twice"))
        assert await worker.receive()
        busy = [asyncio.create_task(collect(client, timed_request(200 + i, 300, 300))) for i in range(2)]
        result = result_of(await worker.plan())
        for _ in range(3):
            await worker.send(result=result)
        status = await stack.until(lambda s: any(w.name == "fake" and w.num_commits > 1 for w in s.workers))
        fake = next(w for w in status.workers if w.name == "fake")
        assert fake.num_steps <= 1
        assert fake.num_output_tokens <= 1
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


async def test_a_worker_that_lives_but_steps_no_more_is_lost(stack: Stack) -> None:
    """Its heart beats on; the step that it runs is over time. Its request goes on elsewhere, token for token."""
    num_tokens = 300
    async with FakeWorker(stack) as worker, stack.client() as client:
        await worker.send(register=register(stack, incarnation="hangs"))
        assert await worker.receive()
        reading = [asyncio.create_task(collect(client, timed_request(20_000 + i, num_tokens, 300))) for i in range(2)]
        plan = await worker.plan()
        sequence = plan.added[0]
        expected = timed_tokens(sequence.sampler.seed, num_tokens)
        for index in range(12):
            row = {
                "attempts": [sequence.attempt],
                "num_computed_tokens": [300 + index],
                "first_output_indexes": [index],
                "num_tokens": [1],
                "token_ids": [expected[index]],
            }
            await worker.send(result=result_of(plan, **row))
            plan = await worker.plan()
        beating = asyncio.create_task(worker.beat())
        while await worker.receive() is not None:
            pass
        beating.cancel()
        for i, task in enumerate(reading):
            assert (await asyncio.wait_for(task, TIMEOUT_S))[0] == timed_tokens(20_000 + i, num_tokens)
