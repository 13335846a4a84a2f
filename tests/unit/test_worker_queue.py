"""Steps launched behind a running one, fed with what it samples: the same tokens as one by one, whatever fails."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagoda.v1 import worker_pb2 as pb

from kernels import Kernels
from tests.checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, make_checkpoint
from tests.unit.queued_steps import PlannerAhead, QueueingRunner, Script, play, random_plans, rows
from worker import model_runner
from worker.assemble import Assembly, assemble
from worker.config import parse_config
from worker.models.decoder import Decoder
from worker.rng import uniforms
from worker.runner import TimedRunner
from worker.sampler import Choices, choose
from worker.step import SampledRows, null_inputs
from worker.wire import StepOutput

BLOCK_SIZE, NUM_BLOCKS = 16, 64
SAMPLERS = (
    {},
    {"temperature": 0.8, "seed": 5, "reports_logprobs": True},
    {"temperature": 1.5, "seed": 6, "top_p": 0.9, "top_k": 40},
    {"min_tokens": 5, "end_token_ids": range(0, VOCAB_SIZE, 2), "reports_logprobs": True},
    {"temperature": 1.0, "seed": 7, "min_tokens": 3, "end_token_ids": range(1, VOCAB_SIZE, 2)},
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small lose time to threads, and tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    model = make_checkpoint("qwen3", tmp_path_factory.mktemp("checkpoints") / "qwen3")
    return start(model)


def start(model: Path) -> Assembly:
    flags = ("--model", str(model), "--num-blocks", str(NUM_BLOCKS), "--poison-freed-blocks")
    return assemble(parse_config(["--scheduler", "127.0.0.1:1", "--name", "queue", *flags]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share_in_time=st.sampled_from([0.5, 0.9, 1.0]))
def test_queued_steps_do_what_they_do_one_by_one(assembly: Assembly, seed: int, share_in_time: float) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    samplers = [rng.choice(SAMPLERS) for _ in prompts]
    plans = random_plans(PlannerAhead(BLOCK_SIZE, NUM_BLOCKS), prompts, samplers, 8, rng)
    one_by_one = play(plans, assembly, assembly.runner)
    device = QueueingRunner(assembly.runner)
    queued = play(plans, assembly, device, lambda: rng.random() < share_in_time)
    assert device.num_fed
    num_steps = {plan.step_id: plan.num_steps for plan in plans}
    assert all(output.num_steps == num_steps[output.step_id] for output in queued.outputs)
    assert [rows(output) for output in queued.outputs] == [rows(output) for output in one_by_one.outputs]
    assert [output.step_id for output in queued.outputs] == [plan.step_id for plan in plans]


def decodes(num_steps: int, together: int = 1, **sampler: bool) -> list[pb.StepPlan]:
    """Three sequences that run side by side in each step, by ids 0 to 2; after the first, so many steps in a plan."""
    planner = PlannerAhead(BLOCK_SIZE, NUM_BLOCKS)
    for seq_id in range(3):
        planner.add(seq_id, [10 + seq_id, 20, 30], **sampler)
    plans = [planner.plan(dict.fromkeys(range(3), 3))]
    steps_each = dict.fromkeys(range(3), together)
    return plans + [planner.plan(steps_each, together) for _ in range((num_steps - 1) // together)]


def tokens(outputs: list[StepOutput], seq_id: int) -> list[int]:
    """What a sequence of `decodes` sampled."""
    found = []
    for output in outputs:
        owners = np.repeat(output.seq_ids, output.num_tokens).tolist()
        found += [token for i, token in zip(owners, output.token_ids.tolist(), strict=True) if i == seq_id]
    return found


@pytest.mark.parametrize("is_queued", [False, True])
def test_a_plan_of_several_steps_does_what_as_many_plans_do(assembly: Assembly, is_queued: bool) -> None:
    alone = play(decodes(7, reports_logprobs=True), assembly, assembly.runner).outputs
    runner = QueueingRunner(assembly.runner) if is_queued else assembly.runner
    outputs = play(decodes(7, 3, reports_logprobs=True), assembly, runner).outputs
    assert [output.num_steps for output in outputs] == [1, 3, 3]
    assert [output.num_tokens.tolist() for output in outputs] == [[1] * 3, [3] * 3, [3] * 3]
    assert [output.num_computed_tokens.tolist() for output in outputs] == [[3] * 3, [6] * 3, [9] * 3]
    assert [output.first_output_indexes.tolist() for output in outputs] == [[0] * 3, [1] * 3, [4] * 3]
    for seq_id in range(3):
        assert tokens(outputs, seq_id) == tokens(alone, seq_id)
    for together, each in ((outputs[1], alone[1:4]), (outputs[2], alone[4:])):
        logprobs = np.stack([output.token_logprobs for output in each], axis=1).ravel()
        assert together.token_logprobs is not None
        assert together.token_logprobs.tolist() == logprobs.tolist()


@pytest.mark.parametrize("is_queued", [False, True])
def test_a_sequence_that_fails_within_a_plan_keeps_what_came_before(
    assembly: Assembly, failing_step: int, is_queued: bool
) -> None:
    runner = QueueingRunner(assembly.runner) if is_queued else assembly.runner
    outputs = play(decodes(9, 4, reports_logprobs=True), assembly, runner).outputs
    assert [output.failed_seq_ids for output in outputs] == [[], [1], []]
    assert [output.num_tokens.tolist() for output in outputs] == [[1, 1, 1], [4, 1, 4], [4, 0, 4]]
    sound = play(decodes(9, reports_logprobs=True), assembly, assembly.runner).outputs
    assert [tokens(outputs, seq_id) for seq_id in range(3)] == [
        tokens(sound, seq_id)[: 2 if seq_id == 1 else None] for seq_id in range(3)
    ]
    assert all(len(output.token_logprobs) == len(output.token_ids) for output in outputs)


@pytest.fixture
def failing_step(monkeypatch: pytest.MonkeyPatch) -> int:
    """The step in which the second row's logits are not finite; what is chosen from them is no id at all."""
    num_calls, logits_of = 0, Decoder.logits

    def logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        found = logits_of(decoder, hidden)
        if num_calls == 3:
            found[1] = float("nan")
        return found

    def choose_badly(logits: torch.Tensor, sampled: SampledRows, kernels: Kernels) -> Choices:
        choices = choose(logits, sampled, kernels)
        token_ids, is_finite = choices.tokens
        token_ids[is_finite == 0] = 10**12
        return choices

    monkeypatch.setattr(Decoder, "logits", logits)
    monkeypatch.setattr(model_runner, "choose", choose_badly)
    return 3


def test_what_follows_from_a_failed_row_fails_too(assembly: Assembly, failing_step: int) -> None:
    """And is run no more from then on; nobody else is touched."""
    outputs = play(decodes(7), assembly, QueueingRunner(assembly.runner)).outputs
    failed = {output.step_id: output.failed_seq_ids for output in outputs if output.failed_seq_ids}
    assert failed == {failing_step: [1], failing_step + 1: [1]}
    # Step 5 was launched when 3, but not 4, was known to have failed.
    assert [int(output.num_computed_tokens[1]) for output in outputs] == [3, 4, 5, 6, 6, 5, 5]
    assert [len(tokens(outputs, seq_id)) for seq_id in range(3)] == [7, 2, 7]
    sound = play(decodes(7), assembly, assembly.runner).outputs
    assert tokens(outputs, 1) == tokens(sound, 1)[:2]
    assert [tokens(outputs, i) for i in (0, 2)] == [tokens(sound, i) for i in (0, 2)]


def test_log_probabilities_stand_beside_their_tokens_where_others_have_failed(
    assembly: Assembly, failing_step: int
) -> None:
    plans = decodes(7, reports_logprobs=True)
    outputs = play(plans, assembly, QueueingRunner(assembly.runner)).outputs
    sound = play(plans, assembly, assembly.runner).outputs
    assert [len(output.token_ids) for output in outputs] == [3, 3, 2, 2, 2, 2, 2]
    for output, wanted in zip(outputs, sound, strict=True):
        assert output.token_logprobs is not None
        assert wanted.token_logprobs is not None
        if len(output.token_ids) == 2:
            assert output.token_logprobs.tolist() == wanted.token_logprobs[[0, 2]].tolist()
        else:
            assert output.token_logprobs.tolist() == wanted.token_logprobs.tolist()


def test_a_sequence_that_failed_begins_anew(assembly: Assembly, failing_step: int) -> None:
    """Sent in full while the step that was fed with its failure still runs, it is what it would be alone."""
    plans = decodes(failing_step + 1)
    planner = PlannerAhead(BLOCK_SIZE, NUM_BLOCKS)
    planner.step_id = len(plans)
    planner.add(1, [11, 20, 30])
    plans += [planner.plan({1: num_tokens}) for num_tokens in (3, 1, 1)]
    outputs = play(plans, assembly, QueueingRunner(assembly.runner)).outputs
    again = tokens(outputs[failing_step + 1 :], 1)
    assert again == tokens(play(decodes(3), assembly, assembly.runner).outputs, 1)


@pytest.mark.parametrize("num_left", [1, 2])
def test_sequences_end_at_their_longest(assembly: Assembly, num_left: int) -> None:
    """The last token is fed, and samples no other; plans for more run nothing."""
    planner = PlannerAhead(BLOCK_SIZE, NUM_BLOCKS)
    planner.add(1, [(7 * i) % VOCAB_SIZE for i in range(MAX_MODEL_LEN - num_left)])
    plans = [planner.plan({1: MAX_MODEL_LEN - num_left}), *(planner.plan({1: 1}) for _ in range(num_left))]
    planner.sequences[1].num_computed = MAX_MODEL_LEN - 1  # nothing is appended for what cannot run
    plans.append(planner.plan({1: 1}))
    device = QueueingRunner(assembly.runner)
    outputs = play(plans, assembly, device).outputs
    assert device.num_fed == num_left
    assert [rows(output) for output in outputs] == [
        rows(output) for output in play(plans, assembly, assembly.runner).outputs
    ]
    assert len(tokens(outputs, 1)) == num_left
    assert outputs[-1].num_computed_tokens.tolist() == [MAX_MODEL_LEN]


def test_timed_log_probabilities_are_a_function_of_seed_and_index() -> None:
    inputs = null_inputs(2, 1)
    assert TimedRunner(0.0, VOCAB_SIZE).launch(inputs).wait().logprobs is None
    asking = replace(inputs.sampled, seeds=np.array([7, 8], np.uint64), reports_logprobs=np.array([True, False]))
    found = TimedRunner(0.0, VOCAB_SIZE).launch(replace(inputs, sampled=asking)).wait().logprobs
    assert found is not None
    assert found.tolist() == [np.log1p(-uniforms(asking.seeds, asking.output_indexes)).astype(np.float32)[0], 0.0]


def test_timed_steps_run_one_after_the_other() -> None:
    runner, start_s = TimedRunner(0.05, VOCAB_SIZE), time.perf_counter()
    first, second = (runner.launch(null_inputs(1, 1)) for _ in range(2))
    second.wait()
    assert first.patience_s() <= 0
    assert time.perf_counter() - start_s >= 0.1


def test_a_broken_plan_is_given_back_behind_the_report_of_what_runs(assembly: Assembly) -> None:
    plans = decodes(4)
    plans[2].scheduled_seq_ids[0] = 99
    script: Script = play(plans[:3], assembly, QueueingRunner(assembly.runner))
    assert [output.step_id for output in script.outputs] == [1, 2]
    assert script.rejected == [(3, 2)]
    assert rows(script.outputs[1]) == rows(play(decodes(2), assembly, assembly.runner).outputs[1])
