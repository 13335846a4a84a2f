"""Decode steps from recordings, on emulated kernels: buckets, padding, buffers and work; a recorder that runs again."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pagoda.v1 import worker_pb2 as pb

from kernels.cuda.library import AttentionArgs, KernelLibrary, RotateArgs
from tests.checkpoints import VOCAB_SIZE
from tests.unit.queued_steps import PlannerAhead, QueueingRunner, play, random_plans, rows
from tests.unit.test_worker_models import NUM_BLOCKS, NUM_OUTPUT, PROMPT_LENS, generate, prompts, reference, start
from worker import loading
from worker.assemble import Assembly
from worker.graphs import Recording, bucket_sizes
from worker.runner import Runner, RunningStep
from worker.step import StepInputs
from worker.wire import Plan

MAX_NUM_SEQS = 8
RESTING = {100, 101, 105}
# What a launch takes from other launches; all else is the same at each replay, or a graph could not hold it.
PASSED_ON = {"query", "out", "heads", "cos", "sin"}


class Rerun:
    """A Recorder without a device: a replay runs everything again, into the same output.

    A launch of a replay must have the arguments of its recording, but for what is passed from launch to launch.
    """

    def __init__(self, fails_at: int | None, error: type[RuntimeError] = RuntimeError) -> None:
        self.launched: list[AttentionArgs | RotateArgs] = []
        self.replayed: list[int] = []  # sequences of each
        self._fails_at = fails_at
        self._error = error

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        run()
        recorded, output = self._run(run)
        if len(output) == self._fails_at:
            raise self._error("no memory for a graph")

        def replay() -> None:
            again, computed = self._run(run)
            assert again == recorded
            output.copy_(computed)
            self.replayed.append(len(output))

        return Recording(replay, output.fill_(float("nan")))

    def _run(self, run: Callable[[], torch.Tensor]) -> tuple[list[tuple[object, ...]], torch.Tensor]:
        self.launched.clear()
        output = run()
        fields = [
            tuple(getattr(args, name) for name, *_ in args._fields_ if name not in PASSED_ON) for args in self.launched
        ]
        return fields, output


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rerun:
    rerun = Rerun(*getattr(request, "param", (None,)))
    monkeypatch.setattr(loading, "select_recorder", lambda device: rerun)
    for name in ("attend", "rotate"):
        launch = getattr(KernelLibrary, name)

        def launch_and_note(library: KernelLibrary, args: AttentionArgs | RotateArgs, launch: object = launch) -> None:
            rerun.launched.append(args)
            launch(library, args)  # type: ignore[operator]

        monkeypatch.setattr(KernelLibrary, name, launch_and_note)
    return rerun


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 16, 64, 100, 256])
def test_buckets_waste_little(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes[0] == 1
    assert sizes[-1] == max_num_seqs
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller < larger <= 2 * smaller
        assert smaller < 16 or larger * 2 <= smaller * 3


@pytest.mark.usefixtures("emulated_worker")
@pytest.mark.parametrize(("family", "block_size"), [("qwen2", 16), ("mistral", 32), ("qwen3", 16)])
def test_greedy_equals_transformers(family: str, block_size: int, directory: Path, recorder: Rerun) -> None:
    """Steps with a prompt's chunk run eagerly, those without from a recording."""
    worker, planner = start(family, directory, block_size, "--max-num-seqs", str(MAX_NUM_SEQS))
    assert generate(worker, planner, 7, random.Random(7)) == reference(family, directory)
    assert set(recorder.replayed) == {1, 2, 4, 8}


def plans_ahead(family: str, directory: Path, *flags: str) -> tuple[Assembly, list[pb.StepPlan]]:
    """A worker whose decode steps are recorded, and all plans for `prompts`: chunks, decodes, both in one step."""
    worker, _ = start(family, directory, 16, "--max-num-seqs", str(MAX_NUM_SEQS), *flags)
    samplers: list[dict[str, Any]] = [
        *({"temperature": 0.8, "seed": 1}, {"temperature": 0.8, "seed": 2, "top_p": 0.9}),
        *({"min_tokens": 9, "end_token_ids": range(0, VOCAB_SIZE, 2)} for _ in range(2)),
        *({} for _ in PROMPT_LENS[4:]),
    ]
    planner = PlannerAhead(16, NUM_BLOCKS)
    return worker.assembly, random_plans(planner, prompts(family), samplers, NUM_OUTPUT, random.Random(7))


@pytest.mark.usefixtures("emulated_worker")
def test_queued_steps_are_fed(directory: Path, recorder: Rerun) -> None:
    """Into the buffers of the recordings, or of an eager step between them."""
    assembly, plans = plans_ahead("qwen3", directory)
    one_by_one = play(plans, assembly, assembly.runner)
    recorder.replayed.clear()
    device = QueueingRunner(assembly.runner)
    queued = play(plans, assembly, device)
    assert [rows(output) for output in queued.outputs] == [rows(output) for output in one_by_one.outputs]
    assert 0 < len(recorder.replayed) < sum(plan.num_steps for plan in plans)
    assert device.num_fed > len(plans) // 2


@pytest.mark.usefixtures("emulated_worker")
def test_forks_go_on_from_shared_blocks(directory: Path, recorder: Rerun) -> None:
    """Full blocks are read once for parent and child; then tables and clusters of a bucket change as children rest."""
    worker, planner = start("qwen3", directory, 16, "--max-num-seqs", str(2 * len(PROMPT_LENS)))
    for step in range(NUM_OUTPUT):
        if step == 5:
            for seq_id in range(len(PROMPT_LENS)):
                planner.fork(seq_id, 100 + seq_id)
        running = [s for s in planner.sequences.values() if step < 12 or s.seq_id not in RESTING]
        scheduled = {s.seq_id: s.num_tokens - s.num_computed for s in running}
        planner.apply(worker.run(planner.plan(scheduled)))
    for seq_id, output in enumerate(reference("qwen3", directory)):
        assert planner.sequences[seq_id].output == output
        child = planner.sequences[100 + seq_id]
        assert child.output == (output[:12] if child.seq_id in RESTING else output)
    assert {8, 14} <= set(recorder.replayed)


@pytest.mark.usefixtures("emulated_worker")
@pytest.mark.parametrize(
    ("recorder", "replayed"),
    [
        *(((MAX_NUM_SEQS, RuntimeError), set()), ((2, RuntimeError), {4, 8})),
        ((MAX_NUM_SEQS, torch.OutOfMemoryError), {1, 2, 4}),
    ],
    indirect=["recorder"],
)
def test_a_recording_that_fails_ends_nothing(
    directory: Path, recorder: Rerun, replayed: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The next larger one serves; where there is none, steps are eager. Smaller ones may need less memory."""
    worker, planner = start("qwen3", directory, 16, "--max-num-seqs", str(MAX_NUM_SEQS))
    assert generate(worker, planner, 7, random.Random(7)) == reference("qwen3", directory)
    assert set(recorder.replayed) == replayed
    warnings = [r for r in caplog.records if r.name == "pagoda.worker" and r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].getMessage().endswith("no memory for a graph")


@pytest.mark.usefixtures("emulated_worker")
def test_enforce_eager_records_nothing(directory: Path, recorder: Rerun) -> None:
    worker, planner = start("qwen3", directory, 16, "--enforce-eager")
    planner.apply(worker.run(planner.plan({0: PROMPT_LENS[0]})))
    assert not recorder.replayed


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3"])
def test_graphs_on_cuda_choose_as_transformers_do(
    family: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    caplog.set_level("INFO", "pagoda.worker")
    flags = ("--device", "cuda", "--dtype", "float32", "--max-num-seqs", str(MAX_NUM_SEQS))
    worker, planner = start(family, directory, 16, *flags)
    assert generate(worker, planner, 7, random.Random(7)) == reference(family, directory)
    assert f"recorded {len(bucket_sizes(MAX_NUM_SEQS))} sizes of decode steps" in caplog.text


class BehindOtherWork:
    """A runner whose GPU has something else to do before each step, longer than the host takes to launch the next."""

    CYCLES = 4_000_000

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def prepare(self, plan: Plan) -> None:
        self.runner.prepare(plan)

    def launch(self, inputs: StepInputs) -> RunningStep:
        torch.cuda._sleep(self.CYCLES)  # type: ignore[no-untyped-call]
        return self.runner.launch(inputs)

    def launch_steps(self, inputs: StepInputs) -> RunningStep | None:
        return self.runner.launch_steps(inputs)


@pytest.mark.gpu
def test_queued_steps_on_cuda_do_what_they_do_one_by_one(directory: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assembly, plans = plans_ahead("qwen3", directory, "--device", "cuda", "--dtype", "float32")
    queued = play(plans, assembly, BehindOtherWork(assembly.runner))
    one_by_one = play(plans, assembly, assembly.runner, is_there=lambda: False)
    assert [rows(output) for output in queued.outputs] == [rows(output) for output in one_by_one.outputs]
    assert sum(output.gap_s == 0 for output in queued.outputs) > len(plans) // 2
