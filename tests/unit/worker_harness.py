"""What the worker's tests share: plans built by hand, and a real gRPC server that plays the scheduler."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from pagoda.v1 import worker_pb2 as pb
from pagoda.v1 import worker_pb2_grpc

from worker.assemble import assemble
from worker.batch import Batch
from worker.config import parse_config
from worker.errors import ProtocolError
from worker.executor import Executor
from worker.ledger import Order
from worker.swaps import NoSwaps
from worker.wire import StepOutput, decode_plan, encode_result

TIMEOUT_S = 20.0


@dataclass
class PlannedSequence:
    """The scheduler's side of one sequence."""

    seq_id: int
    prompt: list[int]
    block_ids: list[int]
    output: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)


class Planner:
    """Builds plans for one worker and applies its results: the smallest scheduler that can be trusted in a test."""

    def __init__(self, block_size: int, num_blocks: int, epoch: int = 1) -> None:
        self.block_size = block_size
        self.epoch = epoch
        self.step_id = 0
        self.committed_step_id = 0
        self.free = list(range(num_blocks, 0, -1))
        self.sequences: dict[int, PlannedSequence] = {}
        self.freed: list[int] = []
        self.removed: list[int] = []
        self.added: list[pb.AddedSequence] = []
        self.copies: list[tuple[int, int, int]] = []

    def add(self, seq_id: int, prompt: Sequence[int], **sampler: Any) -> None:
        self.sequences[seq_id] = PlannedSequence(seq_id, list(prompt), [])
        self.send_in_full(seq_id, **sampler)

    def send_in_full(self, seq_id: int, **sampler: Any) -> None:
        """Whatever the worker knows of the sequence, it begins anew from this."""
        sequence = self.sequences[seq_id]
        self.added.append(
            pb.AddedSequence(
                seq_id=seq_id,
                attempt=1,
                token_ids=(sequence.prompt + sequence.output)[sequence.num_computed :],
                num_prompt_tokens=len(sequence.prompt),
                num_computed_tokens=sequence.num_computed,
                block_ids=sequence.block_ids,
                num_blocks=[len(sequence.block_ids)],
                sampler=pb.SamplerParams(**({"top_p": 1.0} | sampler)),
            )
        )

    def fork(self, seq_id: int, child_id: int) -> None:
        """A copy of the sequence: it shares full blocks, and gets a copy of the last where that is partly filled."""
        parent = self.sequences[seq_id]
        num_full, num_in_last = divmod(parent.num_computed, self.block_size)
        blocks = parent.block_ids[:num_full]
        if num_in_last:
            self.copies.append((parent.block_ids[num_full], self.free.pop(), num_in_last))
            blocks.append(self.copies[-1][1])
        child = PlannedSequence(child_id, list(parent.prompt), blocks, list(parent.output), parent.num_computed)
        self.sequences[child_id] = child
        self.send_in_full(child_id)

    def remove(self, seq_id: int) -> None:
        sequence = self.sequences.pop(seq_id)
        self.removed.append(seq_id)
        self.freed += sequence.block_ids
        self.free += sequence.block_ids

    def plan(self, scheduled: dict[int, int], num_steps: int = 1) -> pb.StepPlan:
        """Run these sequences for so many tokens, in all steps together; blocks are appended as needed."""
        self.step_id += 1
        plan = pb.StepPlan(
            epoch=self.epoch, step_id=self.step_id, committed_step_id=self.committed_step_id, num_steps=num_steps
        )
        plan.removed_seq_ids.extend(self.removed)
        plan.freed_block_ids.extend(self.freed)
        plan.added.extend(self.added)
        for src, dst, num_tokens in self.copies:
            plan.copy_src_block_ids.append(src)
            plan.copy_dst_block_ids.append(dst)
            plan.copy_num_tokens.append(num_tokens)
        self.removed, self.freed, self.added, self.copies = [], [], [], []
        for seq_id, num_tokens in scheduled.items():
            sequence = self.sequences[seq_id]
            end = sequence.num_computed + num_tokens
            short = -(-end // self.block_size) - len(sequence.block_ids)
            if short > 0:
                blocks = [self.free.pop() for _ in range(short)]
                sequence.block_ids += blocks
                plan.appended_seq_ids.append(seq_id)
                plan.appended_num_blocks.append(short)
                plan.appended_block_ids.extend(blocks)
            plan.scheduled_seq_ids.append(seq_id)
            plan.num_scheduled_tokens.append(num_tokens)
        return plan

    def apply(self, result: pb.StepResult) -> None:
        assert not result.failed_seq_ids, f"not finite: {list(result.failed_seq_ids)}"
        self.committed_step_id = result.step_id
        tokens = iter(result.token_ids)
        for i, seq_id in enumerate(result.seq_ids):
            sequence = self.sequences[seq_id]
            sequence.num_computed = result.num_computed_tokens[i]
            assert result.first_output_indexes[i] == len(sequence.output)
            sequence.output += [next(tokens) for _ in range(result.num_tokens[i])]


class SchedulerServer(worker_pb2_grpc.WorkerLinkServicer):
    """Plays the scheduler: hands each stream that a worker opens to the test."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.streams: queue.SimpleQueue[ServerStream] = queue.SimpleQueue()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.so_reuseport", 0),
            ],
        )
        worker_pb2_grpc.add_WorkerLinkServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def Connect(  # noqa: N802 (gRPC's name)
        self, request_iterator: Iterator[pb.ConnectRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConnectResponse]:
        stream = ServerStream(request_iterator)
        context.add_callback(stream.end)
        self.streams.put(stream)
        while (response := stream.outbox.get()) is not None:
            yield response

    def accept(self) -> "ServerStream":
        """The next stream, its Register read."""
        stream = self.streams.get(timeout=TIMEOUT_S)
        stream.register = stream.receive("register")
        return stream

    def stop(self) -> None:
        self._server.stop(grace=None).wait(TIMEOUT_S)


class ServerStream:
    """One stream, seen from the scheduler's side."""

    def __init__(self, requests: Iterator[pb.ConnectRequest]) -> None:
        self.outbox: queue.SimpleQueue[pb.ConnectResponse | None] = queue.SimpleQueue()
        self.register = pb.Register()
        self._inbox: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def send(self, **message: Any) -> None:
        self.outbox.put(pb.ConnectResponse(**message))

    def registered(self, epoch: int, committed_step_id: int = 0, heartbeat_s: float = 0.05) -> list[int]:
        """Register the worker; the steps that it says it dropped."""
        self.send(
            registered=pb.Registered(epoch=epoch, committed_step_id=committed_step_id, heartbeat_interval_s=heartbeat_s)
        )
        dropped = self.receive("plans_dropped")
        assert dropped.epoch == epoch
        return list(dropped.step_ids)

    def receive(self, kind: str) -> Any:
        """The next message up but for heartbeats; must be of `kind`."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            request = self.receive_any()
            found = request.WhichOneof("message")
            if found == kind:
                return getattr(request, kind)
            assert found == "heartbeat", f"{found} came before {kind}"
        raise AssertionError(f"no {kind}")

    def receive_any(self) -> pb.ConnectRequest:
        """The next message up."""
        request = self._inbox.get(timeout=TIMEOUT_S)
        assert request is not None, "the stream has ended"
        return request

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        self.send(plan=plan)
        return self.receive("result")

    def ended(self) -> bool:
        """Wait for the stream's end; whether nothing but heartbeats came before it."""
        while (request := self._inbox.get(timeout=TIMEOUT_S)) is not None:
            if request.WhichOneof("message") != "heartbeat":
                return False
        return True

    def end(self) -> None:
        self.outbox.put(None)

    def _read(self, requests: Iterator[pb.ConnectRequest]) -> None:
        try:
            for request in requests:
                self._inbox.put(request)
        except grpc.RpcError:
            pass
        self._inbox.put(None)


class LocalWorker:
    """A whole worker without its link: plans in, results out, in this process."""

    def __init__(self, *flags: str) -> None:
        self.assembly = assemble(parse_config(["--scheduler", "127.0.0.1:1", "--name", "local", *flags]))
        self.description = self.assembly.description
        self._batch = Batch(self.assembly.limits)

    def run(self, message: pb.StepPlan) -> pb.StepResult:
        source = OnePlan(Order(decode_plan(message), "incarnation", 1))
        executor = Executor(source, self._batch, self.assembly.runner, NoSwaps())
        executor._registration = 1
        with contextlib.suppress(OnePlan.Done):
            executor.run()
        return encode_result(source.outputs[0]).result


class OnePlan:
    """A PlanSource with one plan."""

    class Done(Exception):  # noqa: N818
        """It was reported."""

    def __init__(self, order: Order) -> None:
        self._orders = [order]
        self.outputs: list[StepOutput] = []

    def take(self) -> Order:
        if not self._orders:
            raise self.Done
        return self._orders.pop()

    def take_within(self, seconds: float) -> Order | None:
        return None

    def finish(self, order: Order, output: StepOutput) -> None:
        self.outputs.append(output)

    def reject(self, order: Order, error: ProtocolError) -> None:
        raise error


def unix_address(directory: Path, name: str = "scheduler.sock") -> str:
    return f"unix:{directory / name}"
