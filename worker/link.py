"""The worker's way to its owner: one gRPC stream at a time, broken and reopened for as long as the process lives.

Owns connecting, registering and heartbeats. A reader thread decodes plans as they come, so that the executor finds
them ready; gRPC's own sender thread encodes results, in the shadow of the next step. What may be run, and what must be
sent again, is the ledger's to say.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import grpc
from pagoda.v1 import worker_pb2 as pb

from worker.errors import MismatchError, NameTakenError, ProtocolError
from worker.ledger import Ledger, Order
from worker.metrics import WorkerMetrics
from worker.step import BatchLimits
from worker.stream import Stream, reason
from worker.wire import PROTOCOL_VERSION, StepOutput, SwapReport, decode_plan, encode_swaps

log = logging.getLogger("pagoda.worker")

FIRST_BACKOFF_S = 0.02
LAST_BACKOFF_S = 0.5
REGISTER_TIMEOUT_S = 10.0
NAME_TAKEN_TIMEOUT_S = 5.0
DEFAULT_HEARTBEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """The KV pool, as Register tells it."""

    kv_dtype: str
    num_blocks: int
    block_bytes: int
    num_layers: int
    num_host_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """What warm-up measured; 0: not measured. Seconds of a step of one token, and that one token more of a prompt adds;
    bytes per second between the pools."""

    step_s: float
    s_per_token: float = 0.0
    swap_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Description:
    """What of Register stays the same for the life of the process."""

    worker_name: str
    model_fingerprint: str
    limits: BatchLimits
    pool: PoolFacts
    device: str
    poison_freed_blocks: bool
    speed: Speed


class Link:
    """See `worker.executor.PlanSource`. `start` begins to connect; `close` ends everything."""

    def __init__(self, addresses: tuple[str, ...], description: Description, metrics: WorkerMetrics) -> None:
        self._addresses = addresses
        self._description = description
        self._metrics = metrics
        self._lock = threading.Lock()
        self._ledger = Ledger(uuid.uuid4().hex)
        self._plans_ready: SimpleQueue[None] = SimpleQueue()
        self._stream: Stream | None = None
        self._fatal: Exception | None = None
        self._name_taken_since_s: float | None = None
        self._running_since_s = 0.0
        self._heartbeat_s = DEFAULT_HEARTBEAT_S
        self._closed = threading.Event()

    def start(self) -> None:
        """Connect, in threads of their own, from now on."""
        for name, target in (("link", self._connect_forever), ("heartbeat", self._beat_forever)):
            threading.Thread(target=self.guard, args=(target,), name=name, daemon=True).start()

    def close(self) -> None:
        """End the stream and connect no more."""
        self._closed.set()
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.end()

    def take(self) -> Order:
        """See PlanSource."""
        while True:
            self._plans_ready.get()
            if (order := self._take()) is not None:
                return order

    def take_within(self, seconds: float) -> Order | None:
        """See PlanSource."""
        try:
            if seconds > 0:
                self._plans_ready.get(timeout=seconds)
            else:
                self._plans_ready.get_nowait()
        except Empty:
            return None
        return self._take()

    def finish(self, order: Order, output: StepOutput) -> None:
        """See PlanSource."""
        with self._lock:
            is_kept = self._ledger.finish(order, output)
            self._running_since_s = time.monotonic()
            if is_kept and self._stream is not None and self._stream.is_registered:
                self._stream.send(output)
            num_uncommitted = self._ledger.num_uncommitted
        self._metrics.note_step(output, num_uncommitted)

    def report_swaps(self, report: SwapReport) -> None:
        """See worker.swaps.Reporter. Without a stream nobody needs to know: the next owner issues them again."""
        self._metrics.note_swaps(report)
        with self._lock:
            if self._stream is not None and self._stream.is_registered:
                self._stream.send(encode_swaps(report))

    def reject(self, order: Order, error: ProtocolError) -> None:
        """See PlanSource."""
        log.error("ended the stream: %s", error)
        with self._lock:
            self._ledger.reject(order)
            self._ledger.stream_lost()  # what waits behind it must not run without it
            stream = self._stream
            if stream is not None:
                stream.is_registered = False
        if stream is not None:
            stream.end()

    def _take(self) -> Order | None:
        """None where the plan that was announced has been given back since."""
        with self._lock:
            if self._fatal is not None:
                raise self._fatal
            if self._ledger.running is None:
                self._running_since_s = time.monotonic()
            return self._ledger.take()

    def guard(self, target: Callable[[], None]) -> None:
        """A thread that fails by our own mistake takes the process with it: half a link would hang in silence."""
        try:
            target()
        except Exception as error:
            self._end_process(error)

    def _connect_forever(self) -> None:
        next_address, num_failures = 0, 0
        logged: dict[str, str] = {}
        redirected: str | None = None
        while not self._closed.is_set():
            address = redirected or self._addresses[next_address % len(self._addresses)]
            stream = Stream(address)
            why = self._serve(stream)
            if stream.is_registered:
                num_failures = 0
                logged.clear()
            elif redirected or stream.redirected_to is None:
                next_address += 1
            if logged.get(address) != why and not self._closed.is_set():
                logged[address] = why
                log.warning("no stream to %s: %s", address, why)
            redirected = stream.redirected_to
            if redirected is None or num_failures > 0:
                self._closed.wait(min(FIRST_BACKOFF_S * 2**num_failures, LAST_BACKOFF_S))
            num_failures = min(num_failures + 1, 10)

    def _serve(self, stream: Stream) -> str:
        """Run one stream to its end; why it ended."""
        with self._lock:
            self._stream = stream
            stream.send(self._register_request())
        try:
            for response in stream.responses():
                self._handle(stream, response)
                if stream.redirected_to is not None:
                    return f"redirected to {stream.redirected_to}"
            return "closed by the scheduler"
        except grpc.RpcError as error:
            self._name_taken_since_s = None
            return reason(error)
        except ProtocolError as error:
            return str(error)
        finally:
            with self._lock:
                self._stream = None
                self._ledger.stream_lost()
            self._metrics.note_no_owner()
            stream.end()

    def _handle(self, stream: Stream, response: pb.ConnectResponse) -> None:
        match response.WhichOneof("message"):
            case "plan":
                self._receive(stream, response.plan)
            case "registered":
                self._registered(stream, response.registered)
            case "refused":
                self._refused(response.refused)
            case "redirect":
                stream.redirected_to = response.redirect.address
            case unknown:
                raise ProtocolError(f"message {unknown} is not known to this worker")

    def _receive(self, stream: Stream, message: pb.StepPlan) -> None:
        plan = decode_plan(message)
        with self._lock:
            if not stream.is_registered:
                raise ProtocolError(f"plan {plan.step_id} came without registration")
            if self._ledger.receive(plan):
                self._plans_ready.put(None)

    def _registered(self, stream: Stream, registered: pb.Registered) -> None:
        with self._lock:
            dropped = self._ledger.registered(registered.epoch, registered.committed_step_id)
            results = self._ledger.uncommitted()
            stream.send(pb.ConnectRequest(plans_dropped=pb.PlansDropped(epoch=registered.epoch, step_ids=dropped)))
            for output in results:
                stream.send(output)
            stream.is_registered = True
        self._metrics.note_owner(registered.epoch)
        self._heartbeat_s = registered.heartbeat_interval_s or DEFAULT_HEARTBEAT_S
        self._name_taken_since_s = None
        log.info(
            "registered %s at %s: epoch %d, committed step %d, %d results sent again, %d plans dropped",
            self._description.worker_name,
            stream.address,
            registered.epoch,
            registered.committed_step_id,
            len(results),
            len(dropped),
        )

    def _refused(self, refused: pb.Refused) -> None:
        """Raises ProtocolError, to end the stream; where the process must end, the executor raises too."""
        now_s = time.monotonic()
        if refused.reason == pb.REFUSED_REASON_FENCED:
            with self._lock:
                self._ledger.fence(uuid.uuid4().hex)
        elif refused.reason == pb.REFUSED_REASON_NAME_TAKEN:
            if self._name_taken_since_s is None:
                self._name_taken_since_s = now_s
            if now_s - self._name_taken_since_s >= NAME_TAKEN_TIMEOUT_S:
                self._end_process(NameTakenError(f"name={self._description.worker_name}: {refused.detail}"))
        else:
            self._end_process(MismatchError(f"refused by the scheduler: {refused.detail}"))
        raise ProtocolError(f"refused ({pb.RefusedReason.Name(refused.reason)}): {refused.detail}")

    def _end_process(self, error: Exception) -> None:
        self._closed.set()
        with self._lock:
            self._fatal = error
        self._plans_ready.put(None)

    def _beat_forever(self) -> None:
        while not self._closed.wait(self._heartbeat_s):
            with self._lock:
                stream = self._stream
                if stream is None:
                    continue
                if stream.is_registered:
                    stream.send(self._heartbeat())
                    continue
            if time.monotonic() - stream.opened_s > REGISTER_TIMEOUT_S:
                stream.end()

    def _heartbeat(self) -> pb.ConnectRequest:
        running = self._ledger.running
        return pb.ConnectRequest(
            heartbeat=pb.Heartbeat(
                finished_step_id=self._ledger.finished_step_id,
                running_step_id=running.plan.step_id if running else 0,
                running_s=time.monotonic() - self._running_since_s if running else 0.0,
            )
        )

    def _register_request(self) -> pb.ConnectRequest:
        own, limits, pool = self._description, self._description.limits, self._description.pool
        return pb.ConnectRequest(
            register=pb.Register(
                protocol_version=PROTOCOL_VERSION,
                worker_name=own.worker_name,
                incarnation=self._ledger.incarnation,
                model_fingerprint=own.model_fingerprint,
                block_size=limits.block_size,
                kv_dtype=pool.kv_dtype,
                num_blocks=pool.num_blocks,
                block_bytes=pool.block_bytes,
                # One group, even where layers have a sliding window: it masks, and their blocks are kept in full.
                kv_groups=[pb.KVGroup(num_layers=pool.num_layers)],
                max_model_len=limits.max_model_len,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                device=own.device,
                highest_epoch=self._ledger.highest_epoch,
                highest_step_id=self._ledger.highest_step_id,
                committed_step_id=self._ledger.committed_step_id,
                poison_freed_blocks=own.poison_freed_blocks,
                calibrated_step_s=own.speed.step_s,
                calibrated_s_per_token=own.speed.s_per_token,
                num_host_blocks=pool.num_host_blocks,
                swap_bytes_per_s=own.speed.swap_bytes_per_s,
            )
        )
