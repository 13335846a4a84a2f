"""What the service says of itself: the model, and the state of workers and queues."""

import resource
from dataclasses import dataclass
from pathlib import Path

from pagoda.v1 import generation_pb2 as pb

from scheduler.engine import Engine
from scheduler.fleet import Fleet, Slot
from scheduler.live_request import LiveRequests
from scheduler.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served, and how much of it."""

    model_dir: Path
    fingerprint: str
    tokenizer: Tokenizer
    max_model_len: int
    block_size: int
    max_waiting: int
    """Requests that may wait at once, over all workers."""

    def describe(self) -> pb.GetModelResponse:
        """As clients see it."""
        return pb.GetModelResponse(
            name=self.model_dir.resolve().name,
            fingerprint=self.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            eos_token_ids=self.tokenizer.eos_token_ids,
            has_chat_template=self.tokenizer.has_chat_template,
        )


def status_of(fleet: Fleet, live_requests: LiveRequests, delivery_s: float) -> pb.GetStatusResponse:
    """The state of everything now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return pb.GetStatusResponse(
        workers=[_worker(slot, fleet.redis_round_trip_s) for slot in fleet.slots.values()],
        num_live_requests=len(live_requests),
        num_streams=live_requests.num_streams,
        scheduler_cpu_s=usage.ru_utime + usage.ru_stime,
        delivery_s=delivery_s,
    )


def _worker(slot: Slot, redis_round_trip_s: float) -> pb.WorkerStatus:
    engine = slot.engine
    if engine is None or slot.registered is None:
        return pb.WorkerStatus(name=slot.name, state=pb.WORKER_STATE_LOST, epoch=slot.store.epoch)
    status = _engine(engine, redis_round_trip_s)
    status.name = slot.name
    status.device = slot.registered.device
    return status


def _engine(engine: Engine, redis_round_trip_s: float) -> pb.WorkerStatus:
    planner = engine.planner
    return pb.WorkerStatus(
        state=pb.WORKER_STATE_LOST if engine.is_lost else pb.WORKER_STATE_LIVE,
        epoch=engine.epoch,
        num_running=len(planner.running),
        num_waiting=planner.num_waiting,
        num_blocks=planner.blocks.num_blocks,
        num_free_blocks=planner.blocks.num_free_blocks,
        num_referenced_blocks=planner.blocks.num_referenced_blocks,
        num_cached_blocks=planner.blocks.num_cached_blocks,
        num_prefix_query_tokens=planner.counters.num_prefix_query_tokens,
        num_prefix_hit_tokens=planner.counters.num_prefix_hit_tokens,
        num_preemptions=planner.counters.num_preemptions,
        num_steps=engine.num_steps,
        num_step_tokens=engine.num_step_tokens,
        num_commits=engine.committer.num_commits,
        num_output_tokens=engine.results.num_output_tokens,
        phase_s=engine.phase_s,
        redis_round_trip_s=redis_round_trip_s,
        gap_p50_s=engine.clock.gap_s(0.5),
        gap_p99_s=engine.clock.gap_s(0.99),
        back_to_back=engine.clock.back_to_back,
        num_host_blocks=planner.swapper.host.num_blocks,
        num_free_host_blocks=planner.swapper.host.num_free_blocks,
        num_cached_host_blocks=planner.swapper.host.num_cached_blocks,
        num_host_hit_tokens=planner.counters.num_host_hit_tokens,
        num_blocks_swapped_out=planner.swapper.num_blocks_out,
        num_blocks_swapped_in=planner.swapper.num_blocks_in,
    )
