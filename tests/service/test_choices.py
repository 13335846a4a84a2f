"""Several choices of one request on one stream: told apart, taken up where each stands, ended each by itself."""

import asyncio
from pathlib import Path

import grpc
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from scheduler.wire import choice_seed
from tests.service.calls import Stub, begun, failure
from tests.stack import Stack, collect_choices
from tests.timed import timed_request, timed_text, timed_tokens

N = 3


def own_tokens(seed: int, num_tokens: int) -> list[list[int]]:
    return [timed_tokens(choice_seed(seed, choice), num_tokens) for choice in range(N)]


def gathered(deltas: dict[int, list[pb.Delta]]) -> list[list[int]]:
    return [[token_id for delta in deltas[choice] for token_id in delta.token_ids] for choice in sorted(deltas)]


async def test_each_choice_has_its_own_tokens_text_and_end(client: PagodaClient, timed_model: Path) -> None:
    deltas = await collect_choices(client, timed_request(5001, 40, n=N))
    assert gathered(deltas) == own_tokens(5001, 40)
    for choice, tokens in enumerate(own_tokens(5001, 40)):
        assert "".join(delta.text for delta in deltas[choice]) == timed_text(timed_model, tokens)
        assert [delta.finish_reason for delta in deltas[choice][:-1]] == [0] * (len(deltas[choice]) - 1)
        assert deltas[choice][-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert deltas[choice][-1].usage.num_output_tokens == 40


async def test_a_choice_that_stops_ends_while_the_others_run(stub: Stub) -> None:
    """Its last delta comes at once, and the others are not cut."""
    tokens = own_tokens(5002, 100)
    stop = next(t for t in tokens[1][5:20] if t not in tokens[1][:5] + tokens[0] + tokens[2])
    expected = [own[: own.index(stop) + 1] if stop in own else own for own in tokens]
    request = timed_request(5002, 100, n=N)
    request.sampling.stop_token_ids.append(stop)
    arrived: list[list[int]] = [[] for _ in range(N)]
    ends = []
    async for response in stub.Generate(request):
        delta = response.delta
        arrived[delta.choice] += delta.token_ids
        if delta.finish_reason:
            ends.append((delta.choice, delta.finish_reason))
            if len(ends) == 1:
                assert max(len(arrived[0]), len(arrived[2])) < 100
    assert arrived == expected
    assert ends[0] == (1, pb.FINISH_REASON_STOP)
    assert len(ends) == N


async def test_each_choice_is_taken_up_where_it_stands(stub: Stub, client: PagodaClient) -> None:
    request = timed_request(5003, 60, n=N, request_id="choices", resumable=True)
    await begun(stub.Generate(request), 5)
    wanted = [4, 0, 2]
    deltas: dict[int, list[pb.Delta]] = {}
    async for delta in client.attach("choices", wanted):
        deltas.setdefault(delta.choice, []).append(delta)
    assert gathered(deltas) == [own[first:] for own, first in zip(own_tokens(5003, 60), wanted, strict=True)]
    again = [response async for response in stub.Attach(pb.AttachRequest(request_id="choices", next_index=[59]))]
    arrived = [sum(len(r.delta.token_ids) for r in again if r.delta.choice == choice) for choice in range(N)]
    assert arrived == [1, 60, 60], "an index that is missing is 0"
    code, details = await failure(stub.Attach(pb.AttachRequest(request_id="choices", next_index=[0] * 4)))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "next_index: has 4 entries for 3 choices")


async def test_a_cancel_ends_all_choices(stub: Stub, client: PagodaClient, stack: Stack) -> None:
    request = timed_request(5004, 4000, n=N, request_id="cancelled")
    reading = asyncio.create_task(collect_choices(client, request))
    await stack.until(lambda status: status.workers[0].num_running == N)
    assert (await stub.Cancel(pb.CancelRequest(request_id="cancelled"))).cancelled
    deltas = await reading
    assert [deltas[choice][-1].finish_reason for choice in range(N)] == [pb.FINISH_REASON_ABORT] * N
    assert all(own == theirs[: len(own)] for own, theirs in zip(gathered(deltas), own_tokens(5004, 4000), strict=True))
    assert not (await stub.Cancel(pb.CancelRequest(request_id="cancelled"))).cancelled


async def test_as_many_choices_as_there_may_be(client: PagodaClient) -> None:
    deltas = await collect_choices(client, timed_request(5005, 20, n=64))
    assert gathered(deltas) == [timed_tokens(choice_seed(5005, choice), 20) for choice in range(64)]
