"""The link and the loop against a real gRPC server that plays the scheduler: epochs, resends, fences, ends."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pagoda.v1 import worker_pb2 as pb

import worker.link
from tests.unit.worker_harness import TIMEOUT_S, Planner, SchedulerServer, ServerStream, unix_address
from worker.batch import Batch
from worker.errors import MismatchError, NameTakenError
from worker.executor import Executor
from worker.link import Description, Link, PoolFacts, Speed
from worker.metrics import WorkerMetrics
from worker.step import BatchLimits, Sampled, StepInputs
from worker.swaps import NoSwaps
from worker.wire import Plan

LIMITS = BatchLimits(block_size=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=256)
DESCRIPTION = Description(
    worker_name="worker-7",
    model_fingerprint="f1",
    limits=LIMITS,
    pool=PoolFacts(kv_dtype="float32", num_blocks=50, block_bytes=64, num_layers=3),
    device="cpu",
    poison_freed_blocks=True,
    speed=Speed(0.25),
)


class GatedRunner:
    """Takes as long as the test wants; token ids count up. With `is_patient` its steps leave their caller free."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.steps: list[int] = []
        self.launched: list[StepInputs] = []
        self.is_patient = False
        self.last = 0

    def prepare(self, plan: Plan) -> None:
        self.steps.append(plan.step_id)

    def launch(self, inputs: StepInputs) -> "GatedStep":
        self.launched.append(inputs)
        return GatedStep(self, len(inputs.logit_rows))

    def launch_steps(self, inputs: StepInputs) -> None:
        """One by one."""

    def hold(self) -> None:
        self.started.clear()
        self.gate.clear()


class GatedStep:
    """Begins when it is launched or, without patience, when it is waited for."""

    def __init__(self, runner: GatedRunner, num_samples: int) -> None:
        self.runner = runner
        self.num_samples = num_samples
        if runner.is_patient:
            runner.started.set()

    def patience_s(self) -> float:
        return 0.001 if self.runner.is_patient and not self.runner.gate.is_set() else 0.0

    def wait(self) -> Sampled:
        self.runner.started.set()
        assert self.runner.gate.wait(TIMEOUT_S)
        first = self.runner.last
        self.runner.last += self.num_samples
        return Sampled(np.arange(first, self.runner.last, dtype=np.int64), np.ones(self.num_samples, np.bool_))


class RunningWorker:
    """Link and executor of one process, in threads."""

    def __init__(self, *addresses: str) -> None:
        self.runner = GatedRunner()
        self.error: BaseException | None = None
        self.link = Link(addresses, DESCRIPTION, WorkerMetrics())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.link.start()
        self._thread.start()

    def _run(self) -> None:
        try:
            Executor(self.link, Batch(LIMITS), self.runner, NoSwaps()).run()
        except BaseException as error:
            self.error = error

    def wait_for_end(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def server() -> Iterator[SchedulerServer]:
    server = SchedulerServer()
    yield server
    server.stop()


Start = Callable[..., RunningWorker]


@pytest.fixture
def start() -> Iterator[Start]:
    workers: list[RunningWorker] = []

    def start_one(*addresses: str) -> RunningWorker:
        workers.append(RunningWorker(*addresses))
        return workers[-1]

    yield start_one
    for one in workers:
        one.runner.gate.set()
        one.link.close()


def one_sequence(epoch: int = 1, num_tokens: int = 3) -> Planner:
    planner = Planner(16, 50, epoch)
    planner.add(1, list(range(num_tokens)))
    return planner


def send(stream: ServerStream, plan: pb.StepPlan) -> None:
    stream.send(plan=plan)


def test_registers_with_what_it_is(server: SchedulerServer, start: Start) -> None:
    start(server.address)
    stream = server.accept()
    register = stream.register
    assert len(register.incarnation) == 32
    register.incarnation = ""
    assert register == pb.Register(
        protocol_version=1,
        worker_name="worker-7",
        model_fingerprint="f1",
        block_size=16,
        kv_dtype="float32",
        num_blocks=50,
        block_bytes=64,
        kv_groups=[pb.KVGroup(num_layers=3)],
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        device="cpu",
        poison_freed_blocks=True,
        calibrated_step_s=0.25,
    )
    assert stream.registered(1) == []


@pytest.mark.parametrize("is_patient", [False, True])
def test_runs_plans_in_order_and_tells_its_times(is_patient: bool, server: SchedulerServer, start: Start) -> None:
    """Where a step leaves its caller free, the next is launched behind it: then there is no gap."""
    worker = start(server.address)
    worker.runner.is_patient = is_patient
    stream = server.accept()
    stream.registered(3)
    planner = one_sequence(epoch=3)
    worker.runner.hold()
    for num_tokens in (3, 1, 1):
        send(stream, planner.plan({1: num_tokens}))
        planner.sequences[1].num_computed += num_tokens
    assert worker.runner.started.wait(TIMEOUT_S)
    while len(worker.runner.launched) < 1 + is_patient:
        time.sleep(0.001)
    time.sleep(0.05)  # the step's own time: the result must tell it
    worker.runner.gate.set()
    first, second, third = (stream.receive("result") for _ in range(3))
    assert [r.step_id for r in (first, second, third)] == [1, 2, 3]
    assert [list(r.token_ids) for r in (first, second, third)] == [[0], [1], [2]]
    assert [r.first_output_indexes[0] for r in (first, second, third)] == [0, 1, 2]
    assert (first.epoch, list(first.seq_ids), list(first.attempts), list(first.num_computed_tokens)) == (
        3,
        [1],
        [1],
        [3],
    )
    assert first.step_s >= 0.05
    assert second.step_s < 0.05  # and not since its launch
    assert not first.back_to_back
    assert second.back_to_back
    assert third.back_to_back
    assert second.gap_s == 0 if is_patient else 0 < second.gap_s < 0.05


def test_a_new_owner_gets_results_again_and_hears_what_was_dropped(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    incarnation = stream.register.incarnation
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    assert stream.run(planner.plan({1: 1})).step_id == 2  # and not committed
    planner.sequences[1].num_computed += 1
    worker.runner.hold()
    for _ in range(3):  # step 3 runs, 4 and 5 wait
        send(stream, planner.plan({1: 1}))
        planner.sequences[1].num_computed += 1
    assert worker.runner.started.wait(TIMEOUT_S)
    while worker.link._ledger.num_waiting < 2:
        time.sleep(0.001)
    stream.end()

    second = server.accept()
    assert second.register.incarnation == incarnation
    assert (second.register.highest_epoch, second.register.highest_step_id) == (1, 3)
    assert second.register.committed_step_id == 1, "as the last plan told it"
    assert second.registered(2, committed_step_id=1) == [4, 5]
    assert second.receive("result").step_id == 2
    worker.runner.gate.set()
    late = second.receive("result")
    assert (late.epoch, late.step_id, list(late.token_ids)) == (1, 3, [2])

    # The new owner sends the sequence in full, and numbers on.
    planner = Planner(16, 50, epoch=2)
    planner.step_id = 3
    planner.add(1, [5, 6, 7, 8])
    result = second.run(planner.plan({1: 4}))
    assert (result.epoch, result.step_id, list(result.num_computed_tokens)) == (2, 4, [4])
    assert worker.runner.steps == [1, 2, 3, 4]
    assert second.register.incarnation == incarnation


def test_a_step_that_is_launched_behind_another_counts_as_begun(server: SchedulerServer, start: Start) -> None:
    """A new owner numbers on from it, gets its result, and hears only of what waits behind it."""
    worker = start(server.address)
    worker.runner.is_patient = True
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    worker.runner.hold()
    for num_tokens in (3, 1, 1):  # step 1 runs, 2 is launched, 3 waits
        send(stream, planner.plan({1: num_tokens}))
        planner.sequences[1].num_computed += num_tokens
    assert worker.runner.started.wait(TIMEOUT_S)
    while (len(worker.runner.launched), worker.link._ledger.num_waiting) != (2, 1):
        time.sleep(0.001)
    stream.end()
    second = server.accept()
    assert second.register.highest_step_id == 2
    assert second.registered(2) == [3]
    worker.runner.gate.set()
    results = [second.receive("result") for _ in range(2)]
    assert [(r.epoch, r.step_id, list(r.token_ids)) for r in results] == [(1, 1, [0]), (1, 2, [1])]
    assert worker.runner.launched[1].input_ids.tolist() == [~0]  # what entry 0 of step 1 samples
    planner = one_sequence(epoch=2)
    planner.step_id = 2
    assert list(second.run(planner.plan({1: 3})).num_computed_tokens) == [3]
    assert worker.runner.steps == [1, 2, 3]


def test_a_new_owner_s_plan_is_launched_behind_the_step_that_runs(server: SchedulerServer, start: Start) -> None:
    """The sequences that it sends in full owe nothing to that step, though they bear the same names."""
    worker = start(server.address)
    worker.runner.is_patient = True
    stream = server.accept()
    stream.registered(1)
    worker.runner.hold()
    send(stream, one_sequence().plan({1: 3}))
    assert worker.runner.started.wait(TIMEOUT_S)
    stream.end()
    second = server.accept()
    assert second.registered(2) == []
    planner = one_sequence(epoch=2, num_tokens=4)
    planner.step_id = 1
    send(second, planner.plan({1: 4}))
    while len(worker.runner.launched) < 2:
        time.sleep(0.001)
    worker.runner.gate.set()
    results = [second.receive("result") for _ in range(2)]
    assert [(r.epoch, r.step_id, list(r.num_computed_tokens)) for r in results] == [(1, 1, [3]), (2, 2, [4])]
    planner.apply(results[1])
    assert list(second.run(planner.plan({1: 1})).num_computed_tokens) == [5]
    assert worker.runner.launched[-1].input_ids.tolist() == list(results[1].token_ids)


def test_what_a_new_owner_does_not_send_has_ended(server: SchedulerServer, start: Start) -> None:
    start(server.address)
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    stream.end()
    stream = server.accept()
    stream.registered(2, committed_step_id=1)
    planner.epoch = 2
    send(stream, planner.plan({1: 1}))
    assert stream.ended()


def test_committed_results_are_forgotten(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    for _ in range(20):  # each plan says that the step before is committed
        planner.apply(stream.run(planner.plan({1: 1})))
    assert [output.step_id for output in worker.link._ledger.uncommitted()] == [21]


def test_a_lower_epoch_is_ignored(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    stream.registered(5)
    planner = one_sequence(epoch=4)
    send(stream, planner.plan({1: 3}))
    planner = one_sequence(epoch=5)
    assert stream.run(planner.plan({1: 3})).epoch == 5
    assert worker.runner.steps == [1]


def test_an_owner_of_a_lower_epoch_is_left(server: SchedulerServer, start: Start) -> None:
    start(server.address)
    stream = server.accept()
    stream.registered(5)
    stream.end()
    stream = server.accept()
    stream.send(registered=pb.Registered(epoch=4))
    assert stream.ended()
    assert server.accept().register.highest_epoch == 5


def test_fenced(server: SchedulerServer, start: Start) -> None:
    """A new incarnation that remembers the epoch and nothing else; what still runs is void."""
    worker = start(server.address)
    stream = server.accept()
    before = stream.register.incarnation
    stream.registered(4)
    planner = one_sequence(epoch=4)
    planner.apply(stream.run(planner.plan({1: 3})))
    worker.runner.hold()
    send(stream, planner.plan({1: 1}))
    assert worker.runner.started.wait(TIMEOUT_S)
    stream.send(refused=pb.Refused(reason=pb.REFUSED_REASON_FENCED, detail="its lease ran out"))

    stream = server.accept()
    assert stream.register.incarnation != before
    assert (stream.register.highest_epoch, stream.register.highest_step_id) == (4, 0)
    assert stream.registered(4) == []
    worker.runner.gate.set()
    planner = one_sequence(epoch=4)
    result = stream.run(planner.plan({1: 3}))  # and no other result before it
    assert (result.step_id, list(result.num_computed_tokens)) == (1, [3])


def test_mismatch_ends_the_process(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    server.accept().send(refused=pb.Refused(reason=pb.REFUSED_REASON_MISMATCH, detail="block_size 16, wanted 32"))
    worker.wait_for_end()
    assert isinstance(worker.error, MismatchError)
    assert worker.error.exit_code == 3
    assert "block_size 16, wanted 32" in str(worker.error)


def test_a_taken_name_ends_the_process_after_a_while(
    server: SchedulerServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.link, "NAME_TAKEN_TIMEOUT_S", 0.3)
    running = start(server.address)
    num_tries = 0
    while running.error is None and num_tries < 50:
        server.accept().send(refused=pb.Refused(reason=pb.REFUSED_REASON_NAME_TAKEN, detail="held by another"))
        num_tries += 1
        running._thread.join(0.15)
    assert isinstance(running.error, NameTakenError)
    assert running.error.exit_code == 4
    assert num_tries > 2


def test_follows_a_redirect(server: SchedulerServer, start: Start, tmp_path: Path) -> None:
    owner = SchedulerServer(unix_address(tmp_path))
    start(server.address)
    server.accept().send(redirect=pb.Redirect(address=owner.address))
    stream = owner.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    # The owner yields: the worker goes where it is sent with all it has.
    stream.send(redirect=pb.Redirect(address=server.address))
    stream = server.accept()
    assert stream.register.highest_step_id == 1
    stream.registered(2)
    assert stream.receive("result").step_id == 1
    owner.stop()


def test_tries_its_addresses_in_turn(server: SchedulerServer, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
    start(dead, dead, server.address)
    server.accept().registered(1)


def test_a_silent_address_is_passed_over(server: SchedulerServer, start: Start) -> None:
    """One that accepts connections and never answers, as a stopped process does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        start(f"127.0.0.1:{silent.getsockname()[1]}", server.address)
        server.accept().registered(1)
        assert time.monotonic() - began < 8


def test_a_frozen_scheduler_is_noticed(server: SchedulerServer, start: Start, tmp_path: Path) -> None:
    """The connection stays open and nothing passes any more: pings find out."""
    frozen = threading.Event()
    host, port = server.address.split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_relay, args=(listener, (host, int(port)), frozen), daemon=True).start()
        other = SchedulerServer(unix_address(tmp_path))
        start(f"127.0.0.1:{listener.getsockname()[1]}", other.address)
        server.accept().registered(1)
        frozen.set()
        began = time.monotonic()
        other.accept()
        assert time.monotonic() - began < 8
        other.stop()


def _relay(listener: socket.socket, target: tuple[str, int], frozen: threading.Event) -> None:
    """Passes bytes both ways, on every connection, until frozen."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if frozen.is_set():
                    time.sleep(TIMEOUT_S)
                sink.sendall(data)

    with contextlib.suppress(OSError):
        while True:
            near = listener.accept()[0]
            far = socket.create_connection(target)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


def planner_free_step(step_id: int) -> pb.StepPlan:
    """A plan that runs sequence 1 for a token it has not: nothing, but a step all the same."""
    return pb.StepPlan(epoch=1, step_id=step_id, committed_step_id=1, scheduled_seq_ids=[1], num_scheduled_tokens=[1])


@pytest.mark.parametrize("is_patient", [False, True])
def test_a_broken_plan_ends_the_stream_not_the_worker(is_patient: bool, server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    bad = planner.plan({1: 1})
    bad.scheduled_seq_ids[0] = 99
    planner.add(2, [1, 2])
    good = planner.plan({2: 2})
    worker.runner.hold()
    send(stream, planner_free_step(2))
    assert worker.runner.started.wait(TIMEOUT_S)
    worker.runner.is_patient = is_patient
    bad.step_id, good.step_id = 3, 4
    send(stream, bad)
    send(stream, good)
    while worker.link._ledger.num_waiting < 2:
        time.sleep(0.001)
    worker.runner.gate.set()
    stream = server.accept()
    assert stream.register.highest_step_id == 3
    assert sorted(stream.registered(2, committed_step_id=1)) == [3, 4]  # neither was run, the good one included
    assert stream.receive("result").step_id == 2  # whether or not it was sent before the end
    assert worker.runner.steps == [1, 2]
    planner = one_sequence(epoch=2)
    planner.step_id = 3
    assert list(stream.run(planner.plan({1: 3})).num_computed_tokens) == [3]


def test_a_broken_plan_leaves_the_step_that_runs_alone(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    worker.runner.is_patient = True
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    worker.runner.hold()
    send(stream, planner.plan({1: 3}))
    assert worker.runner.started.wait(TIMEOUT_S)
    bad = planner.plan({1: 1})
    bad.scheduled_seq_ids[0] = 99
    send(stream, bad)
    while worker.link._ledger.highest_step_id < 2:
        time.sleep(0.001)
    worker.runner.gate.set()
    stream = server.accept()
    assert stream.registered(2) == [2]
    assert list(stream.receive("result").token_ids) == [0]
    assert worker.runner.steps == [1]
    planner = one_sequence(epoch=2)
    planner.step_id = 2
    assert list(stream.run(planner.plan({1: 3})).num_computed_tokens) == [3]


def test_a_plan_before_registration_ends_the_stream(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    send(stream, one_sequence().plan({1: 3}))
    assert stream.ended()
    assert server.accept().registered(1) == []
    assert worker.runner.steps == []


@pytest.mark.parametrize("step_id", [1, 2])
def test_a_repeated_step_ends_the_stream(step_id: int, server: SchedulerServer, start: Start) -> None:
    start(server.address)
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    planner.apply(stream.run(planner.plan({1: 1})))
    planner.step_id = step_id - 1
    send(stream, planner.plan({1: 1}))
    assert stream.ended()


def test_heartbeats_follow_the_steps(server: SchedulerServer, start: Start) -> None:
    worker = start(server.address)
    stream = server.accept()
    stream.registered(1, heartbeat_s=0.02)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    worker.runner.hold()
    send(stream, planner.plan({1: 1}))
    beats: list[pb.Heartbeat] = []
    while not beats or beats[-1].running_s < 0.1:
        beat = stream.receive_any()
        if beat.WhichOneof("message") == "heartbeat":
            beats.append(beat.heartbeat)
    assert (beats[-1].finished_step_id, beats[-1].running_step_id) == (1, 2)
    worker.runner.gate.set()
    planner.apply(stream.receive("result"))
    while (beat := stream.receive_any().heartbeat).running_step_id:
        pass
    assert (beat.finished_step_id, beat.running_s) == (2, 0)


def process(server: SchedulerServer, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "worker", "--scheduler", server.address, "--timed-step-s", "0.01", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_at_once(number: signal.Signals, server: SchedulerServer) -> None:
    child = process(server, "--name", "w")
    stream = server.accept()
    stream.registered(1)
    planner = one_sequence()
    planner.apply(stream.run(planner.plan({1: 3})))
    began = time.monotonic()
    child.send_signal(number)
    errors = child.communicate(timeout=TIMEOUT_S)[1]
    assert child.returncode == 0
    assert time.monotonic() - began < 2
    assert errors.count("registered w at") == 1
    assert "Traceback" not in errors
    assert stream.ended()


def test_a_signal_ends_a_process_that_finds_nobody(server: SchedulerServer) -> None:
    child = process(server)
    server.accept().registered(1)
    server.stop()
    child.terminate()
    child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0


def test_exit_code_of_a_mismatch(server: SchedulerServer) -> None:
    child = process(server)
    server.accept().send(refused=pb.Refused(reason=pb.REFUSED_REASON_MISMATCH, detail="model f1, wanted f2"))
    errors = child.communicate(timeout=TIMEOUT_S)[1]
    assert child.returncode == 3
    assert errors.splitlines()[-1] == "worker: refused by the scheduler: model f1, wanted f2"


def test_timed_steps_sample_the_same_tokens_anywhere(server: SchedulerServer) -> None:
    outputs = []
    for _ in range(2):
        child = process(server)
        stream = server.accept()
        stream.registered(1)
        planner = Planner(16, 50)
        planner.add(1, [1, 2, 3], seed=77)
        for num_tokens in (3, 1, 1, 1):
            planner.apply(stream.run(planner.plan({1: num_tokens})))
        outputs.append(planner.sequences[1].output)
        child.terminate()
        child.communicate(timeout=TIMEOUT_S)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 4
