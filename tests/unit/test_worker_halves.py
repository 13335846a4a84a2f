"""Decodes of many sequences on two threads, each of which takes half of them: the same as those of one thread."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from pagoda.v1 import worker_pb2 as pb

from tests.checkpoints import make_checkpoint
from tests.unit.queued_steps import PlannerAhead, play
from tests.unit.worker_harness import PlannedSequence
from worker.assemble import Assembly, assemble
from worker.config import parse_config

NUM_BLOCKS = 700
NUM_SEQS = 45
PREFIX_LEN = 288  # of some of them; partitions of the kernels end at 256 tokens
OTHER_LENS = (3, 17, 250, 255, 256, 40)
STEPS = (1, 5, 6, 4)  # of plans
NUM_LEFT = 20  # sequences that take all steps of the last plan, too few for halves; each of the others takes less
NUM_PROMPT_IDS = 60

Sampler = Mapping[str, object]
GREEDY: Sampler = {}
WARM: Sampler = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# qwen2 has sliding windows in some layers
@pytest.fixture(scope="module", params=[("llama3", "float32"), ("llama3", "bfloat16"), ("qwen2", "float32")])
def assembly(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    family, dtype = request.param
    model = make_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)
    flags = ("--model", str(model), "--dtype", dtype, "--num-blocks", str(NUM_BLOCKS), "--poison-freed-blocks")
    limits = ("--max-num-seqs", "64", "--max-num-batched-tokens", "8192")
    return assemble(parse_config(["--scheduler", "127.0.0.1:1", "--name", "halves", *flags, *limits]))


def plans(samplers: tuple[Sampler, ...], num_sharing: int) -> list[pb.StepPlan]:
    """Prompts, the last `num_sharing` with the first one's prefix, of both halves; then decodes of all."""
    planner = PlannerAhead(16, NUM_BLOCKS)

    def prompt(seq_id: int, length: int) -> list[int]:
        return [2 + (7 * seq_id + 3 * i + i // 50) % NUM_PROMPT_IDS for i in range(length)]

    prefix = prompt(0, PREFIX_LEN)
    planner.add(0, [*prefix, 2])
    made = [planner.plan({0: PREFIX_LEN})]
    blocks = planner.sequences[0].block_ids[: PREFIX_LEN // 16]
    for seq_id in range(1, NUM_SEQS):
        sampler = {"seed": seq_id, **samplers[seq_id % len(samplers)]}
        if seq_id < NUM_SEQS - num_sharing:
            planner.add(seq_id, prompt(seq_id, OTHER_LENS[seq_id % len(OTHER_LENS)]), **sampler)
        else:
            own = prompt(seq_id, 1 + seq_id % 20)
            planner.sequences[seq_id] = PlannedSequence(seq_id, [*prefix, *own], list(blocks), [], PREFIX_LEN)
            planner.send_in_full(seq_id, **sampler)
    lens = {sequence.seq_id: len(sequence.prompt) - sequence.num_computed for sequence in planner.sequences.values()}
    made.append(planner.plan(lens))
    made += [planner.plan(dict.fromkeys(range(NUM_SEQS), num_steps), num_steps) for num_steps in STEPS[:-1]]
    return [*made, planner.plan({seq_id: last_steps(seq_id) for seq_id in range(NUM_SEQS)}, STEPS[-1])]


def last_steps(seq_id: int) -> int:
    """Of the last plan."""
    return STEPS[-1] if seq_id < NUM_LEFT else 3 if seq_id < 2 * NUM_LEFT else 1


def run(
    assembly: Assembly, samplers: tuple[Sampler, ...], num_sharing: int, num_threads: int
) -> dict[int, tuple[int, ...]]:
    """What each sequence says."""
    torch.set_num_threads(num_threads)
    said: dict[int, tuple[int, ...]] = dict.fromkeys(range(NUM_SEQS), ())
    for output in play(plans(samplers, num_sharing), assembly, assembly.runner).outputs[1:]:
        ends = np.cumsum(output.num_tokens)
        for seq_id, tokens in zip(output.seq_ids, np.split(output.token_ids, ends), strict=False):
            said[seq_id] += tuple(tokens.tolist())
    return said


@pytest.mark.parametrize("num_sharing", [0, 30])
@pytest.mark.parametrize("samplers", [(GREEDY,), (GREEDY, GREEDY, WARM)])
def test_halves_are_the_whole(assembly: Assembly, samplers: tuple[Sampler, ...], num_sharing: int) -> None:
    whole, halves = (run(assembly, samplers, num_sharing, num_threads) for num_threads in (1, 2))
    assert halves == whole
    assert len(whole) == NUM_SEQS
    assert all(len(tokens) == 1 + sum(STEPS[:-1]) + last_steps(seq_id) for seq_id, tokens in whole.items())
    assert len(set(whole.values())) > NUM_SEQS / 2, "all say the same"


@pytest.mark.parametrize("samplers", [(GREEDY,), (WARM,)])
def test_who_fails_does_so_alone(assembly: Assembly, samplers: tuple[Sampler, ...]) -> None:
    whole = run(assembly, samplers, 0, 1)
    said = Counter(token for tokens in whole.values() for token in set(tokens))
    for half in (range(NUM_SEQS // 2), range(NUM_SEQS // 2, NUM_SEQS)):
        failing, fatal = next((i, t) for i in half for t in whole[i][3:-2] if said[t] == 1 and t >= 2 + NUM_PROMPT_IDS)
        embedding = assembly.runner._runner._decoder._embedding  # type: ignore[attr-defined]
        before = embedding[fatal].clone()
        embedding[fatal] = float("nan")
        try:
            found = run(assembly, samplers, 0, 2)
        finally:
            embedding[fatal] = before
        until = whole[failing].index(fatal) + 1
        assert found == whole | {failing: whole[failing][:until]}
