"""best_of: more choices are sampled than come, and those that come are the likeliest, best first."""

import asyncio

import grpc
import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.best_of import score
from scheduler.client import PagodaClient
from scheduler.wire import choice_seed
from tests.service.calls import Stub, begun, failure
from tests.stack import Stack, collect_choices
from tests.timed import timed_logprobs, timed_request, timed_tokens

Ranked = list[tuple[float, list[int]]]


def best_of(seed: int, num_tokens: int, n: int, count: int, **fields: object) -> pb.GenerateRequest:
    request = timed_request(seed, num_tokens, n=n, **fields)
    request.sampling.best_of = count
    return request


def ranked(seed: int, num_tokens: int, n: int, count: int, end: int | None = None) -> Ranked:
    """The n best of all, by definition. end: a token that ends a choice."""
    found = []
    for choice in range(count):
        own = choice_seed(seed, choice)
        tokens = timed_tokens(own, num_tokens)
        if end in tokens:
            tokens = tokens[: tokens.index(end) + 1]
        found.append((-score(timed_logprobs(own, len(tokens))), choice, tokens))
    return [(-negated, tokens) for negated, _, tokens in sorted(found)[:n]]


def gathered(deltas: dict[int, list[pb.Delta]]) -> Ranked:
    assert sorted(deltas) == list(range(len(deltas)))
    chosen = [deltas[number] for number in sorted(deltas)]
    return [(own[-1].score, [token for delta in own for token in delta.token_ids]) for own in chosen]


def assert_same(found: Ranked, expected: Ranked) -> None:
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-6)


@pytest.mark.parametrize(("n", "count"), [(1, 2), (2, 5), (3, 64), (63, 64)])
async def test_the_likeliest_come_best_first(client: PagodaClient, n: int, count: int) -> None:
    deltas = await collect_choices(client, best_of(6001, 30, n, count))
    assert_same(gathered(deltas), ranked(6001, 30, n, count))
    for own in deltas.values():
        assert own[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert own[-1].usage.num_output_tokens == 30


async def test_choices_of_several_lengths_are_compared_by_their_plain_sums(client: PagodaClient) -> None:
    """What ends early is not divided by its length: it has fewer tokens to lose by."""
    end = timed_tokens(choice_seed(6002, 2), 4)[3]
    request = best_of(6002, 60, 3, 5)
    request.sampling.stop_token_ids.append(end)
    deltas = await collect_choices(client, request)
    expected = ranked(6002, 60, 3, 5, end)
    assert_same(gathered(deltas), expected)
    assert len(expected[0][1]) == 4
    assert deltas[0][-1].finish_reason == pb.FINISH_REASON_STOP


async def test_nothing_comes_before_all_have_ended(stub: Stub, stack: Stack) -> None:
    """One ends at once and is the best: it waits for the others."""
    end = timed_tokens(choice_seed(6003, 1), 1)[0]
    request = best_of(6003, 200, 1, 3)
    request.sampling.stop_token_ids.append(end)
    arrived = []
    async for response in stub.Generate(request):
        if response.HasField("delta"):
            status = await stack.status()
            arrived.append((list(response.delta.token_ids), sum(w.num_running for w in status.workers)))
    assert arrived == [([end], 0)]


async def test_as_many_as_n_stream_as_they_come(client: PagodaClient) -> None:
    """That is the default: nothing is left to choose."""
    deltas = await collect_choices(client, best_of(6004, 40, 3, 3))
    assert [tokens for _, tokens in gathered(deltas)] == [timed_tokens(choice_seed(6004, i), 40) for i in range(3)]
    assert len(deltas[0]) > 1
    assert not deltas[0][-1].HasField("score")


async def test_a_stream_is_taken_up_while_choices_run_and_when_they_are_over(stub: Stub, client: PagodaClient) -> None:
    request = best_of(6005, 60, 2, 4, request_id="best-resumed", resumable=True)
    async for _ in stub.Generate(request):
        break  # accepted
    expected = ranked(6005, 60, 2, 4)
    for wanted in ([0, 0], [59, 7], [60, 60]):
        deltas: dict[int, list[pb.Delta]] = {}
        async for delta in client.attach("best-resumed", wanted):
            deltas.setdefault(delta.choice, []).append(delta)
        assert_same(gathered(deltas), [(s, t[first:]) for (s, t), first in zip(expected, wanted, strict=True)])
    code, details = await failure(stub.Attach(pb.AttachRequest(request_id="best-resumed", next_index=[0] * 3)))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "next_index: has 3 entries for 2 choices")
    code, details = await failure(stub.Attach(pb.AttachRequest(request_id="best-resumed", next_index=[61])))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "next_index: 61 is past the 60 tokens")


async def test_a_cancel_ends_all_choices_and_leaves_those_that_had_ended_in_front(
    stub: Stub, client: PagodaClient, stack: Stack
) -> None:
    own = [timed_tokens(choice_seed(6006, choice), 500) for choice in range(3)]
    end = next(token for token in own[2][60:200] if token not in own[0] + own[1] + own[2][:60])
    request = best_of(6006, 500, 2, 3, request_id="best-cancelled")
    request.sampling.stop_token_ids.append(end)
    reading = asyncio.create_task(collect_choices(client, request))
    await stack.until(lambda status: status.workers[0].num_running == 3)
    await stack.until(lambda status: status.workers[0].num_running == 2)
    assert (await stub.Cancel(pb.CancelRequest(request_id="best-cancelled"))).cancelled
    deltas = await reading
    reasons = [deltas[choice][-1].finish_reason for choice in range(2)]
    assert reasons == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_ABORT]
    (_, whole), (_, cut) = gathered(deltas)
    assert whole == own[2][: own[2].index(end) + 1]
    assert cut in [tokens[: len(cut)] for tokens in own[:2]]


async def test_its_choices_share_one_prompt(client: PagodaClient, stack: Stack) -> None:
    await stack.idle()
    await asyncio.sleep(0.1)  # a plan that runs on for who has left is counted when it ends
    before = (await stack.idle()).workers[0]
    await collect_choices(client, best_of(6007, 10, 1, 8, prompt_tokens=200))
    after = (await stack.idle()).workers[0]
    assert after.num_step_tokens - before.num_step_tokens == 200 + 8 * 9


async def test_a_client_that_leaves_ends_it(stub: Stub, stack: Stack) -> None:
    call = stub.Generate(best_of(6008, 4000, 1, 3, request_id="best-left"))
    async for _ in call:
        break
    call.cancel()
    await stack.idle()
    await begun(stub.Generate(timed_request(6009, 3)), 3)
