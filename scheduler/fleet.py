"""All workers: who is live, who is lost, and where their requests go.

A worker that is lost is fenced at once: its pool is reclaimed, its requests go to live workers, or wait for one. A
scheduler that starts gives the workers of its predecessor one lease to come back with their pools as they are.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any

from pagoda.v1 import worker_pb2 as pb

from scheduler.adoption import Adoption
from scheduler.compatibility import Compatibility, RefusedError
from scheduler.config import SchedulerConfig
from scheduler.engine import Engine, Link
from scheduler.errors import UnavailableError
from scheduler.explain import Explanations
from scheduler.live_request import Ending, LiveRequest, LiveRequests
from scheduler.lost_workers import LostWorkers, reclaim
from scheduler.place import Place
from scheduler.recovery import ModelIdentity, Reviver
from scheduler.redis_pipe import Pipe
from scheduler.request_metrics import RequestMetrics, log_end
from scheduler.request_store import OwnershipLostError, RequestStore
from scheduler.store import WorkerStore
from scheduler.worker_choice import best_worker

log = logging.getLogger("pagoda.fleet")

WATCH_INTERVAL_S = 0.1


@dataclass(slots=True, eq=False)
class Slot:
    """One worker's name, over all its incarnations."""

    name: str
    store: WorkerStore
    lost_since: float = field(default_factory=monotonic)
    engine: Engine | None = None
    link: Link | None = None
    registered: pb.Register | None = None
    is_fenced: bool = False
    """Whether its pool is reclaimed, and its requests are free to go elsewhere."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class FleetModel:
    """What the fleet needs to know of the model and of the requests for it."""

    compatibility: Compatibility
    reviver: Reviver
    live_requests: LiveRequests


class Fleet:
    """Owns the slots. Every public call is safe at any moment of a worker's life."""

    def __init__(self, config: SchedulerConfig, pipe: Pipe, requests: RequestStore, model: FleetModel) -> None:
        self._config = config
        self._pipe = pipe
        self._requests = requests
        self._compatibility = model.compatibility
        self._reviver = model.reviver
        self._live_requests = model.live_requests
        self.metrics = RequestMetrics()
        self._adoption = Adoption(config, pipe, requests, model.reviver, self.metrics)
        self._lost = LostWorkers(requests, model.reviver, self.place, self._on_end)
        self.slots: dict[str, Slot] = {}
        self.explanations = Explanations()
        self.changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Learns the workers of earlier schedulers, and begins to watch."""
        for name in await self._requests.worker_names():
            self.slots[name] = self._new_slot(name)
        self._spawn(self._watch())

    async def close(self) -> None:
        """Stops planning; what is decided is committed first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self.slots.values():
            if slot.engine is not None:
                slot.engine.lose("the scheduler ends")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(slot.engine.retire(), 2.0)
        self._live_requests.interrupt_streams()

    # -- choosing -----------------------------------------------------------------------------------------------------

    @property
    def engines(self) -> list[Engine]:
        """The live workers' engines."""
        return [s.engine for s in self.slots.values() if s.engine is not None and not s.engine.is_lost]

    async def wait_for_worker(self) -> None:
        """Returns once there is a live worker. Raises UnavailableError after the configured wait."""
        if self.engines:
            return
        try:
            async with asyncio.timeout(self._config.worker_wait_s), self.changed:
                await self.changed.wait_for(lambda: bool(self.engines))
        except TimeoutError:
            raise UnavailableError("no worker is there; start one, or try again later") from None

    async def wait_until_resolved(self, worker: str) -> None:
        """Returns once it is known what became of a worker: it came back, or it was fenced."""

        def is_resolved() -> bool:
            slot = self.slots.get(worker)
            return slot is None or slot.is_fenced or (slot.engine is not None and not slot.engine.is_lost)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.worker_wait_s), self.changed:
                await self.changed.wait_for(is_resolved)

    def place(self, live: LiveRequest) -> Place:
        """Where a request that has no worker is to go."""
        return Place(live, self._choose)

    def _choose(self, live: LiveRequest) -> Engine | None:
        leader, engines = live.choices[0].sequence, self.engines
        if not engines:
            return None
        return engines[best_worker(len(leader.token_ids), [engine.planner.outlook(leader) for engine in engines])]

    @property
    def redis_round_trip_s(self) -> float:
        """Moving average of a script's round trip."""
        return self._pipe.round_trip_s

    def engine_of(self, live: LiveRequest) -> Engine | None:
        """The engine that holds a request now."""
        for engine in self.engines:
            if live.choices[0].sequence.seq_id in engine.live:
                return engine
        return None

    def end(self, live: LiveRequest, ending: Ending) -> None:
        """Ends a request wherever it is; without a worker, as soon as one takes it or it is given up."""
        for choice in live.choices:
            choice.ending = choice.ending or ending
        engine = self.engine_of(live)
        if engine is not None:
            engine.end(live)

    # -- a worker comes -----------------------------------------------------------------------------------------------

    async def register(self, register: pb.Register, link: Link) -> Engine:
        """Makes a worker ours: adopts its pool where Redis knows it, else lays an empty one. Starts nothing yet.

        Raises RefusedError where it may not serve.
        """
        self._compatibility.check(register)
        slot = self.slots.setdefault(register.worker_name, self._new_slot(register.worker_name))
        self._refuse_second(slot, register)
        async with slot.lock:
            if slot.engine is not None:
                slot.engine.lose("it registered again")
                await self._fence(slot)
            await self._requests.register_worker(slot.name)
            self._reviver.model = ModelIdentity(
                self._compatibility.fingerprint, self._compatibility.kv_dtype, self._config.block_size
            )
            engine = await self._adoption.adopt(slot.store, register, link, self._on_end)
            slot.engine, slot.link, slot.registered, slot.is_fenced = engine, link, register, False
            log.info(
                "%s is live: %d blocks on %s",
                slot.name,
                register.num_blocks,
                register.device,
                extra={"worker": slot.name},
            )
        return engine

    def serve(self, engine: Engine) -> None:
        """Runs a registered engine until it is lost; then its requests go on elsewhere."""
        self._spawn(self._serve(engine))

    async def _serve(self, engine: Engine) -> None:
        if not engine.is_lost:
            engine.start()
        await self._announce()
        self._spawn(self._rehome_all())
        reason = await engine.lost
        slot = self.slots[engine.worker]
        log.warning("%s is lost: %s", slot.name, reason, extra={"worker": slot.name})
        async with slot.lock:
            if slot.engine is engine:
                await self._fence(slot)
        await self._announce()
        await self._rehome_all()

    def _refuse_second(self, slot: Slot, register: pb.Register) -> None:
        engine = slot.engine
        if engine is None or engine.is_lost or slot.registered is None:
            return
        if slot.registered.incarnation == register.incarnation:
            return
        if monotonic() - engine.clock.last_heard < self._config.lease_s:
            raise RefusedError(
                pb.REFUSED_REASON_NAME_TAKEN, f"a live worker has the name {slot.name}; give this one another --name"
            )

    # -- a worker goes ------------------------------------------------------------------------------------------------

    async def _fence(self, slot: Slot) -> None:
        """After this nothing of the lost incarnation counts, and its requests are in Redis, whole. Holds the lock."""
        engine, slot.engine, slot.link = slot.engine, None, None
        assert engine is not None
        slot.lost_since = monotonic()
        await engine.retire()
        if engine.committer.has_lost_ownership:
            for choice in engine.live.values():
                choice.request.is_orphaned = True
                choice.request.notify()
            return  # whoever owns it now, or our next seizure, finds everything in Redis
        await reclaim(slot.store)
        slot.is_fenced = True

    async def _rehome_all(self) -> None:
        for slot in list(self.slots.values()):
            if slot.is_fenced and slot.engine is None and self.engines:
                async with slot.lock:
                    if slot.engine is None:
                        await self._lost.rehome(slot.name, slot.store)

    # -- watching -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            due = monotonic() + WATCH_INTERVAL_S
            await asyncio.sleep(WATCH_INTERVAL_S)
            late_s = monotonic() - due
            if self._pipe.oldest_wait_s > self._config.worker_wait_s:
                self._live_requests.interrupt_streams()  # Redis is away for too long for a client to be left waiting
            for slot in list(self.slots.values()):
                engine = slot.engine
                if engine is not None and not engine.is_lost:
                    engine.clock.excuse(late_s)
                    if engine.planner.pins.next_expiry_s <= time():
                        engine.look_again()
                    self._judge(engine)
                elif engine is None and not slot.lock.locked():
                    await self._resolve_lost(slot)

    def _judge(self, engine: Engine) -> None:
        silent_s = monotonic() - engine.clock.last_heard
        if silent_s > self._config.lease_s:
            engine.lose(f"silent for {silent_s:.1f} s")
        elif (overdue_s := engine.clock.overdue_s()) > 0:
            engine.lose(f"its step is {overdue_s:.1f} s over time")

    async def _resolve_lost(self, slot: Slot) -> None:
        lost_s = monotonic() - slot.lost_since
        if not slot.is_fenced and lost_s > self._config.lease_s:
            async with slot.lock:
                if slot.engine is None:
                    await slot.store.seize(0)
                    await reclaim(slot.store)
                    slot.is_fenced = True
            await self._announce()
            await self._rehome_all()
        elif slot.is_fenced and lost_s > self._config.worker_wait_s and not self.engines:
            async with slot.lock:
                if slot.engine is None:
                    await self._lost.give_up(slot.name, slot.store)
                    slot.lost_since = monotonic()

    def _on_end(self, live: LiveRequest) -> None:
        """The end is recorded: streams finish, and logs that it left on earlier workers expire."""
        live.notify()
        self.metrics.note_end(live)
        log_end(live)
        self.explanations.keep(live)
        if live.num_streams == 0:
            self._live_requests.discard(live)
        if any(choice.sequence.segment_first_index for choice in live.choices):
            self._spawn(self._expire_logs(live))

    async def _expire_logs(self, live: LiveRequest) -> None:
        record = await self._requests.load(live.body.request_id)
        if record is not None:
            await self._requests.expire_logs(record)

    async def _announce(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _new_slot(self, name: str) -> Slot:
        return Slot(name, WorkerStore(self._pipe, name, self._config.record_ttl_s))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, OwnershipLostError):
                log.warning("a worker has another owner: %s", error)
            else:
                log.error("a task of the fleet failed", exc_info=error)
