"""`python -m scheduler`: puts the scheduler together, serves, and ends cleanly on SIGINT and SIGTERM."""

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from pagoda.fingerprint import model_fingerprint
from pagoda.logs import configure
from pagoda.v1 import generation_pb2_grpc, worker_pb2, worker_pb2_grpc

from scheduler.compatibility import Compatibility
from scheduler.config import ConfigError, SchedulerConfig, parse_flags
from scheduler.fleet import Fleet, FleetModel
from scheduler.health import SERVICES, follow_progress
from scheduler.interceptors import ErrorsToStatus
from scheduler.live_request import Ending, LiveRequests
from scheduler.malformed import RefuseMalformed
from scheduler.metrics import Measured, serve_metrics
from scheduler.recovery import Reviver
from scheduler.redis_check import check_redis
from scheduler.redis_cluster import ClusterPipe
from scheduler.redis_pipe import Pipe, RedisPipe
from scheduler.request_store import RequestStore
from scheduler.scripts import ALL_SCRIPTS
from scheduler.sequence import FinishReason
from scheduler.service import GenerationService
from scheduler.status import ServedModel
from scheduler.tokenizer import Tokenizer, TokenizerError
from scheduler.worker_link import WorkerLinkService

log = logging.getLogger("pagoda")

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 200),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
)
"""A prompt is far below 8 MiB; results of a step are far below it too."""


def load_model(config: SchedulerConfig) -> ServedModel:
    """Tokenizer, fingerprint and lengths. Raises ConfigError where the folder is not a usable model."""
    try:
        fingerprint = model_fingerprint(config.model_dir)
        tokenizer = Tokenizer.load(config.model_dir)
        declared = int(json.loads((config.model_dir / "config.json").read_text("utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TokenizerError) as error:
        raise ConfigError(f"--model={config.model_dir}: {error}") from None
    if config.max_model_len > declared:
        raise ConfigError(f"--max-model-len={config.max_model_len}: the model is made for at most {declared} tokens")
    return ServedModel(
        config.model_dir,
        fingerprint,
        tokenizer,
        config.max_model_len or declared,
        config.block_size,
        config.max_waiting,
    )


async def serve(config: SchedulerConfig) -> None:
    """Serves until a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    model = load_model(config)
    is_cluster = await check_redis(config.redis_url)
    pipe: Pipe = (ClusterPipe if is_cluster else RedisPipe)(config.redis_url, ALL_SCRIPTS)
    pipe.start()
    requests = RequestStore(pipe, config.record_ttl_s, config.request_ttl_s)
    live_requests = LiveRequests(lambda live: fleet.end(live, Ending(FinishReason.ABORT)))
    reviver = Reviver(model.tokenizer, requests, live_requests)
    compatibility = Compatibility(model.fingerprint, config.block_size, config.kv_dtype, model.max_model_len)
    fleet = Fleet(config, pipe, requests, FleetModel(compatibility, reviver, live_requests))
    service = GenerationService(model, fleet, requests, reviver, live_requests)
    stop_metrics = listen_for_metrics(config, Measured(fleet, pipe, live_requests, fleet.metrics))
    await service.start()
    await fleet.start()

    def count_status(status: grpc.StatusCode) -> None:
        fleet.metrics.num_refused[status.name] += 1

    interceptors = (ErrorsToStatus(count_status), RefuseMalformed())
    server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
    health = health_aio.HealthServicer()
    generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
    worker_pb2_grpc.add_WorkerLinkServicer_to_server(WorkerLinkService(fleet), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    link_name = worker_pb2.DESCRIPTOR.services_by_name["WorkerLink"].full_name
    names = (*SERVICES[1:], link_name, HEALTH_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    for address in config.listen:
        listen(server, address)
    await server.start()
    log.info("serving %s on %s", config.model_dir, ", ".join(config.listen))
    gc.collect()
    gc.freeze()  # what is here now stays: no collection need walk through it in the middle of a step
    following = asyncio.create_task(follow_progress(health, fleet, pipe))
    await stop.wait()
    following.cancel()
    await asyncio.to_thread(stop_metrics)
    await health.enter_graceful_shutdown()
    await fleet.close()
    await server.stop(grace=0.5)
    await pipe.close()


def listen(server: grpc.aio.Server, address: str) -> None:
    """Binds one address. Raises ConfigError where it is taken or malformed."""
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(f"--listen={address}: can't be bound; is the port in use? Choose another one")


def listen_for_metrics(config: SchedulerConfig, measured: Measured) -> Callable[[], None]:
    """What ends it. Raises ConfigError where the address is taken."""
    if not config.metrics_listen:
        return lambda: None
    try:
        return serve_metrics(config.metrics_listen, measured)
    except OSError as error:
        raise ConfigError(f"--metrics-listen={config.metrics_listen}: {error}") from None


def main() -> int:
    """The process's exit code: 0 after a signal, 2 for a configuration that can't work, 1 for our bug."""
    try:
        config = parse_flags(sys.argv[1:])
        configure("scheduler", config.log_level, config.log_format)
        asyncio.run(serve(config))
    except ConfigError as error:
        print(f"scheduler: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
