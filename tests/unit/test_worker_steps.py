"""Decode steps that a CPU's kernels run at once: the same, bit by bit, as one by one."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pagoda.v1 import worker_pb2 as pb

from kernels.cpu import CpuStep
from kernels.cpu.work import DecodesWork
from tests.checkpoints import MAX_MODEL_LEN, make_checkpoint
from tests.unit.queued_steps import PlannerAhead, play
from worker.assemble import Assembly, assemble
from worker.config import parse_config
from worker.runner import Runner
from worker.step import StepInputs
from worker.wire import StepOutput

NUM_BLOCKS = 80
PROMPT_LENS = (3, 250, 17, 255)  # partitions of the kernels end at 256 tokens
NUM_STEPS = 12
NUM_PROMPT_IDS = 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small lose time to threads, and tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def assembly(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    return start(make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoints") / request.param))


def start(model: Path) -> Assembly:
    flags = ("--model", str(model), "--num-blocks", str(NUM_BLOCKS), "--poison-freed-blocks")
    return assemble(parse_config(["--scheduler", "127.0.0.1:1", "--name", "steps", *flags]))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of the kernels did."""
    found: list[int] = []
    decode = CpuStep.decode

    def noted(*arguments: object) -> NDArray[np.int64] | None:
        choices = decode(*arguments)  # type: ignore[arg-type]
        found.append(0 if choices is None else len(choices))
        return choices

    monkeypatch.setattr(CpuStep, "decode", noted)
    return found


Sampler = Mapping[str, object]
GREEDY: Sampler = {}
WARM: Sampler = {"temperature": 0.8, "seed": 5}
ALL_FILTERS: Sampler = {"temperature": 1.7, "seed": 2**63, "top_k": 90, "top_p": 0.95, "min_p": 0.01}


def with_prompts(*samplers: Sampler) -> tuple[PlannerAhead, pb.StepPlan]:
    """Who has planned the prompts of all. samplers: of the sequences, in turn."""
    planner = PlannerAhead(16, NUM_BLOCKS)
    for seq_id, (length, sampler) in enumerate(zip(PROMPT_LENS, cycle(samplers or (GREEDY,)), strict=False)):
        planner.add(seq_id, [2 + (7 * seq_id + 3 * i) % NUM_PROMPT_IDS for i in range(length)], **sampler)
    return planner, planner.plan(dict(enumerate(PROMPT_LENS)))


def plans(num_steps: int, *samplers: Sampler) -> list[pb.StepPlan]:
    """Prompts first, then NUM_STEPS decodes of all, so many in each plan."""
    planner, prompts = with_prompts(*samplers)
    decodes = dict.fromkeys(range(4), num_steps)
    return [prompts, *(planner.plan(decodes, num_steps) for _ in range(NUM_STEPS // num_steps))]


class OneByOne:
    """The same runner, which is asked for each step by itself."""

    def __init__(self, runner: Runner) -> None:
        self.prepare, self.launch = runner.prepare, runner.launch

    def launch_steps(self, inputs: StepInputs) -> None:
        """Never."""


def alone(assembly: Assembly, *samplers: Sampler) -> list[StepOutput]:
    """A plan for each step, none of which the kernels run by themselves."""
    return play(plans(1, *samplers), assembly, OneByOne(assembly.runner)).outputs


def tokens(outputs: list[StepOutput]) -> dict[int, list[int]]:
    """By sequence."""
    found: dict[int, list[int]] = {seq_id: [] for seq_id in range(len(PROMPT_LENS))}
    for output in outputs:
        at = 0
        for seq_id, count in zip(output.seq_ids, output.num_tokens.tolist(), strict=True):
            found[seq_id] += output.token_ids[at : at + count].tolist()
            at += count
    return found


def test_tokens_are_those_of_one_step_after_the_other(assembly: Assembly, at_once: list[int]) -> None:
    expected = tokens(alone(assembly))
    assert not at_once
    assert tokens(play(plans(1), assembly, assembly.runner).outputs) == expected
    assert at_once == [1] * NUM_STEPS
    at_once.clear()
    outputs = play(plans(6), assembly, assembly.runner).outputs
    # The first decode fills the partition of the sequence that begins with 255 tokens, the fifth behind it the other's.
    assert at_once == [1, 5, 6]
    assert tokens(outputs) == expected
    assert len(set(tokens(outputs)[1])) > 2, "one token again and again shows nothing"
    assert [output.num_steps for output in outputs] == [1, 6, 6]
    assert outputs[-1].num_computed_tokens.tolist() == [length + NUM_STEPS for length in PROMPT_LENS]
    assert outputs[-1].first_output_indexes.tolist() == [7] * 4


@pytest.mark.parametrize("samplers", [(), (GREEDY, WARM, ALL_FILTERS)])
@pytest.mark.parametrize("is_alone", [False, True])
def test_sequences_leave_a_plan_one_after_the_other(
    assembly: Assembly, at_once: list[int], samplers: tuple[Sampler, ...], is_alone: bool
) -> None:
    """In the middle of a plan the kernels stop, where a sequence's work is cut anew, when another has left already."""
    planner, prompts = with_prompts(*samplers)
    steps_each = {3: 12, 1: 12, 0: 7, 2: 1}
    later = {3: 2, 0: 1}
    few = [prompts, planner.plan(steps_each, 12), planner.plan(later, 2)]
    runner = OneByOne(assembly.runner) if is_alone else assembly.runner
    outputs = play(few, assembly, runner).outputs
    assert at_once == ([] if is_alone else [1, 5, 6, 2])
    assert [output.num_steps for output in outputs] == [1, 12, 2]
    assert [output.num_tokens.tolist() for output in outputs[1:]] == [[12, 12, 7, 1], [2, 1]]
    assert outputs[1].num_computed_tokens.tolist() == [PROMPT_LENS[i] + n for i, n in steps_each.items()]
    assert not any(output.failed_seq_ids for output in outputs)
    expected = tokens(play(plans(1, *samplers), assembly, assembly.runner).outputs)
    for seq_id, found in tokens(outputs).items():
        assert found[:13] == expected[seq_id][: len(found)]
        assert len(found) == 1 + steps_each[seq_id] + later.get(seq_id, 0)


def test_work_is_made_anew_where_it_is_cut_anew(assembly: Assembly, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, made = tokens(alone(assembly)), []
    make = DecodesWork.__init__

    def noted(self: DecodesWork, *arguments: object) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(DecodesWork, "__init__", noted)
    assert tokens(play(plans(1), assembly, assembly.runner).outputs) == expected
    assert len(made) == 3  # at first, and where a sequence outgrows its partition


@pytest.mark.parametrize("samplers", [(WARM,), (ALL_FILTERS,), (GREEDY, WARM, ALL_FILTERS)])
def test_what_is_random_is_drawn_as_in_one_step_after_the_other(
    assembly: Assembly, at_once: list[int], samplers: tuple[Sampler, ...]
) -> None:
    expected = tokens(alone(assembly, *samplers))
    assert expected != tokens(alone(assembly))
    outputs = play(plans(6, *samplers), assembly, assembly.runner).outputs
    assert at_once == [1, 5, 6]
    assert tokens(outputs) == expected


def test_with_a_window_it_is_one_step_at_once(tmp_path: Path, at_once: list[int]) -> None:
    """What the window leaves out grows from step to step. This model has layers with and without one."""
    assembly = start(make_checkpoint("qwen2", tmp_path / "qwen2"))
    assert at_once == [1] * 3, "a decode, while it warms up"
    at_once.clear()
    expected = tokens(alone(assembly))
    assert tokens(play(plans(6), assembly, assembly.runner).outputs) == expected
    assert at_once == [1] * NUM_STEPS


@pytest.mark.parametrize("sampler", [GREEDY, WARM])
def test_who_fails_does_so_in_the_same_step(assembly: Assembly, at_once: list[int], sampler: Sampler) -> None:
    sound = tokens(alone(assembly, sampler))
    others = sound[0] + sound[1] + sound[3]
    fatal = next(token for token in sound[2][3:-2] if token not in others and token >= 2 + NUM_PROMPT_IDS)
    embedding = assembly.runner._runner._decoder._embedding  # type: ignore[attr-defined]
    before = embedding[fatal].clone()
    embedding[fatal] = float("nan")
    try:
        expected = alone(assembly, sampler)
        outputs = play(plans(6, sampler), assembly, assembly.runner).outputs
    finally:
        embedding[fatal] = before
    assert max(at_once) > 1
    assert tokens(outputs) == tokens(expected)
    assert len(tokens(outputs)[2]) < len(sound[2])
    assert {i for output in outputs for i in output.failed_seq_ids} == {2}
    last, last_expected = outputs[-1].num_computed_tokens.tolist(), expected[-1].num_computed_tokens.tolist()
    assert [last[i] for i in (0, 1, 3)] == [last_expected[i] for i in (0, 1, 3)]


@pytest.mark.parametrize("sampler", [{"reports_logprobs": True}, {"min_tokens": 9, "end_token_ids": range(4)}])
def test_who_asks_for_more_is_run_step_by_step(assembly: Assembly, at_once: list[int], sampler: Sampler) -> None:
    expected = alone(assembly, sampler)
    outputs = play(plans(6, sampler), assembly, assembly.runner).outputs
    assert tokens(outputs) == tokens(expected)
    assert max(at_once, default=0) <= (6 if "min_tokens" in sampler else 0)


def test_the_longest_sequence_ends_where_it_must(assembly: Assembly) -> None:
    planner = PlannerAhead(16, NUM_BLOCKS)
    planner.add(0, [2 + i % NUM_PROMPT_IDS for i in range(MAX_MODEL_LEN - 4)])
    few = [planner.plan({0: MAX_MODEL_LEN - 4}), planner.plan({0: 3}, 3)]
    outputs = play(few, assembly, assembly.runner).outputs
    assert [output.num_tokens.tolist() for output in outputs] == [[1], [3]]
    assert outputs[-1].num_computed_tokens.tolist() == [MAX_MODEL_LEN - 1]
