"""A worker that registers becomes ours: an engine is made for it from what Redis holds.

The same incarnation keeps its pool and goes on with its sequences where they are; another one begins with an empty
pool, and the sequences of the one before it are queued again.
"""

from collections.abc import Callable
from time import time

from pagoda.v1 import worker_pb2 as pb

from scheduler.admitter import PlannerLimits
from scheduler.block_manager import BlockCopy, BlockManager
from scheduler.committer import CommitEvents, Committer
from scheduler.compatibility import RefusedError
from scheduler.config import SchedulerConfig
from scheduler.engine import Engine, EngineParts, Link
from scheduler.host_pool import HostPool
from scheduler.live_request import LiveRequest
from scheduler.lost_workers import reclaim
from scheduler.pins import Pins
from scheduler.plan_length import PlanLength
from scheduler.planner import Planner
from scheduler.recovery import Reviver, restore_running
from scheduler.redis_pipe import Pipe
from scheduler.request_metrics import RequestMetrics
from scheduler.request_store import RequestStore
from scheduler.step_clock import StepClock
from scheduler.store import WorkerImage, WorkerStore
from scheduler.swap_ahead import SwapAhead, SwapCosts
from scheduler.swapper import Swapper


class Adoption:
    """Makes engines. Its caller sees to it that no worker is adopted twice at once."""

    def __init__(
        self,
        config: SchedulerConfig,
        pipe: Pipe,
        requests: RequestStore,
        reviver: Reviver,
        metrics: RequestMetrics,
    ) -> None:
        self._config = config
        self._pipe = pipe
        self._requests = requests
        self._reviver = reviver
        self._metrics = metrics

    async def adopt(
        self, store: WorkerStore, register: pb.Register, link: Link, on_end: Callable[[LiveRequest], None]
    ) -> Engine:
        """Seizes the worker; its engine, not started. `on_end` hears of each request whose end is recorded.

        Raises RefusedError where the worker's incarnation was declared dead, or has forgotten what Redis has lost.
        """
        meta = await store.seize(register.highest_epoch)
        is_known = meta.incarnation == register.incarnation
        if is_known and meta.committed_step_id < register.committed_step_id:
            # Nobody has the results in between: what the pool holds can't be told any more.
            raise RefusedError(pb.REFUSED_REASON_FENCED, "Redis has lost steps that it had acknowledged")
        if is_known:
            image = await store.load()
        elif register.highest_step_id > 0:
            raise RefusedError(pb.REFUSED_REASON_FENCED, "this incarnation was declared dead")
        else:
            image = await reclaim(store, register.incarnation, register.num_blocks, register.num_host_blocks)
        step_id = max(meta.committed_step_id, register.highest_step_id) if is_known else 0
        engine = self._engine(store, register, link, image, step_id, on_end)
        if is_known:
            engine.expect_results(meta.committed_step_id)
        await self._take_over(register.worker_name, engine, image)
        return engine

    def _engine(
        self,
        store: WorkerStore,
        register: pb.Register,
        link: Link,
        image: WorkerImage,
        step_id: int,
        on_end: Callable[[LiveRequest], None],
    ) -> Engine:
        def on_ended(live: LiveRequest) -> None:
            engine.drop(live)
            on_end(live)

        tokens = self._metrics.note_tokens
        events = CommitEvents(lambda: engine.wake(), on_ended, tokens, lambda reason: engine.lose(reason))
        committer = Committer(register.worker_name, store, self._requests, events)
        limits = PlannerLimits(
            self._config.block_size, register.max_num_seqs, register.max_num_batched_tokens, self._config.overcommit
        )
        blocks = BlockManager.from_image(image.pool, committer.changes)
        swapper = Swapper(blocks, HostPool.from_image(image.host), limits.block_size)
        costs = SwapCosts(register.block_bytes, register.swap_bytes_per_s, register.calibrated_s_per_token)
        pins = Pins(blocks, self._config.max_pinned_blocks(register.num_blocks, register.block_bytes))
        pins.adopt(image.pins, image.tables)
        planner = Planner(limits, blocks, SwapAhead(blocks, swapper, self._config.preemption, costs), pins)
        copies = blocks.pending_copies.items()
        committer.acked_copies = [BlockCopy(source, copy, num_tokens) for copy, (source, num_tokens) in copies]
        committer.acked_swaps = swapper.adopt(image.host)
        planner.history.worker, planner.history.now_s = register.worker_name, time()
        clock = StepClock(register.calibrated_step_s, register.calibrated_s_per_token)
        plan_length = PlanLength(self._config.plan_ms / 1e3, register.calibrated_step_s)
        parts = EngineParts(planner, committer, link, clock, plan_length, lambda: self._pipe.round_trip_s)
        engine = Engine(parts, step_id + 1)
        engine.poisons_freed_blocks = register.poison_freed_blocks
        return engine

    async def _take_over(self, worker: str, engine: Engine, image: WorkerImage) -> None:
        """Every sequence under the worker's tag is the new engine's: with its blocks, or queued again."""
        for revived in await self._reviver.revive(worker, image):
            tables = {seq_id: image.tables[seq_id] for seq_id in revived.rows if seq_id in image.tables}
            live = revived.live
            if live is None:
                for seq_id, table in tables.items():
                    engine.planner.blocks.release(seq_id, table)
                revived.drop_from(engine.committer.changes)
                continue
            first_indexes = live.log_lengths
            if revived.recorded_worker != worker:
                live.begin_segments(first_indexes)
            owner = engine.committer.owner
            await self._requests.own(live.body.request_id, owner, revived.recorded_worker, first_indexes)
            if tables:
                for choice in live.choices:
                    if choice.sequence.seq_id in tables:
                        restore_running(choice.sequence, image, self._config.block_size)
                engine.hold(live)
            else:
                engine.open(live)
