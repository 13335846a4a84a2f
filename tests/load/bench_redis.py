"""`make bench-redis`: what workers cost Redis: bytes per block, and time per step, on one node and on a cluster.

Every simulated worker has a full pool and 256 sequences (full_pool.py); its scripts are the real ones, packed and sent
as the scheduler does it. Each case is measured with decode steps of 64 and of 256 sequences: first one script at a
time, then 32 in flight per node. At its end, what Redis holds must equal the mirror. The servers are the bench's own,
and end with it.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.load.bench_step import machine_line
from tests.load.lockstep_fleet import Fleet
from tests.redis_cluster import RedisCluster
from tests.redis_servers import RedisServer, server_binaries

GIB = 2**30
IN_FLIGHT_PER_NODE = 32
NUM_BLOCKS, MANY_BLOCKS = 10_000, 100_000
APPEND_ONLY = ("--appendonly", "yes", "--appendfsync", "no")  # as the embedded Redis runs


@dataclass(frozen=True)
class ScriptFigures:
    """Step scripts of one size."""

    num_rows: int
    num_scripts: int
    in_redis_us: float
    """Mean over all scripts, as Redis measures it."""
    in_redis_p50_us: float | None
    in_redis_p99_us: float | None
    """Of the slowest node; None where the server keeps no percentiles."""
    round_trip_p50_us: float
    round_trip_p99_us: float
    """One script at a time: packed, sent, applied, answered."""
    scripts_per_s: float
    """All nodes together, pipelined."""
    redis_cpu_us: float
    """Processor time of the servers per pipelined script, parsing and answering included."""
    client_cpu_us: float
    """Processor time of this process per pipelined script: deciding, packing, the event loop."""


@dataclass(frozen=True)
class CaseFigures:
    """Workers that are served by one or more nodes."""

    label: str
    num_nodes: int
    workers_by_node: list[int]
    num_blocks: int
    """Of one worker."""
    num_published_blocks: int
    num_referenced_blocks: int
    used_bytes: int
    """used_memory beside that of empty servers and of connections, right after the pools were filled."""
    bytes_by_part: dict[str, int]
    """Of the first worker, by MEMORY USAGE."""
    scripts: list[ScriptFigures]

    @property
    def num_workers(self) -> int:
        return sum(self.workers_by_node)

    @property
    def bytes_per_worker(self) -> float:
        return self.used_bytes / self.num_workers

    @property
    def bytes_per_block(self) -> float:
        """Per published block: its row in the pool and its entry in the index."""
        return (self.bytes_by_part["pool"] + self.bytes_by_part["index"]) / self.num_published_blocks


async def measure_scripts(fleet: Fleet, num_rows: int, num_scripts: int) -> ScriptFigures:
    """Whole rounds, at least so many scripts of each kind."""
    num_rounds = math.ceil(num_scripts / len(fleet.stores))
    _for_all(fleet, "CONFIG RESETSTAT")
    waits_s = statistics.quantiles(await fleet.run(num_rows, num_rounds, 1), n=100)
    redis_cpu_s, client_cpu_s, began = _redis_cpu_s(fleet), time.process_time(), time.perf_counter()
    count = len(await fleet.run(num_rows, num_rounds, IN_FLIGHT_PER_NODE * len(fleet.nodes)))
    seconds, client_cpu_s = time.perf_counter() - began, time.process_time() - client_cpu_s
    calls, in_redis_us, percentiles = _script_stats(fleet)
    assert calls == 2 * count, "scripts were sent twice: a reply was late"
    return ScriptFigures(
        num_rows=num_rows,
        num_scripts=calls,
        in_redis_us=in_redis_us,
        in_redis_p50_us=percentiles.get("p50"),
        in_redis_p99_us=percentiles.get("p99"),
        round_trip_p50_us=1e6 * waits_s[49],
        round_trip_p99_us=1e6 * waits_s[98],
        scripts_per_s=count / seconds,
        redis_cpu_us=1e6 * (_redis_cpu_s(fleet) - redis_cpu_s) / count,
        client_cpu_us=1e6 * client_cpu_s / count,
    )


def _for_all(fleet: Fleet, command: str) -> None:
    for node in fleet.nodes:
        with node.client() as client:
            client.execute_command(command)


def _redis_cpu_s(fleet: Fleet) -> float:
    total_s = 0.0
    for node in fleet.nodes:
        with node.client() as client:
            cpu = client.info("cpu")
            total_s += float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])
    return total_s


def _script_stats(fleet: Fleet) -> tuple[int, float, dict[str, float]]:
    """(calls, mean microseconds, percentiles of the node whose median is highest)."""
    calls, usec = 0, 0
    percentiles: list[dict[str, float]] = []
    for node in fleet.nodes:
        with node.client() as client:
            stats = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "usec": 0})
            percentiles.append(client.info("latencystats").get("latency_percentiles_usec_evalsha", {}))
        calls, usec = calls + stats["calls"], usec + stats["usec"]
    return calls, usec / calls, max(percentiles, key=lambda found: found.get("p50", 0.0))


async def measure_case(label: str, fleet: Fleet, flags: argparse.Namespace) -> CaseFigures:
    """A fleet that is filled; prints its rows."""
    used_bytes, parts = fleet.used_bytes, fleet.bytes_by_part()
    num_published, num_referenced = fleet.pool.num_published_blocks, fleet.pool.blocks.num_referenced_blocks
    scripts = [await measure_scripts(fleet, num_rows, flags.scripts) for num_rows in flags.rows]
    await fleet.check()
    by_node, num_blocks = fleet.check_nodes(), fleet.pool.blocks.num_blocks
    case = CaseFigures(
        label, len(fleet.nodes), by_node, num_blocks, num_published, num_referenced, used_bytes, parts, scripts
    )
    print("\n".join(show(case)), flush=True)
    return case


HEAD = """\
| workers x blocks | nodes | bytes per published block | MB per worker | sequences in the step | script in Redis: \
mean, p50, p99 | round trip p50, p99 | pipelined scripts/s | CPU per script: Redis, client |
|---|---|---|---|---|---|---|---|---|"""


def show(case: CaseFigures) -> Iterator[str]:
    """A row per size of step; times in microseconds."""
    for s in case.scripts:
        in_redis = [s.in_redis_us, s.in_redis_p50_us, s.in_redis_p99_us]
        cells = [
            f"{case.num_workers:,} x {case.num_blocks:,}" + (f", {case.label}" if case.label else ""),
            str(case.num_nodes),
            f"{case.bytes_per_block:.0f}",
            f"{case.bytes_per_worker / 1e6:.2f}",
            str(s.num_rows),
            ", ".join("-" if us is None else f"{us:,.0f}" for us in in_redis),
            f"{s.round_trip_p50_us:,.0f}, {s.round_trip_p99_us:,.0f}",
            f"{s.scripts_per_s:,.0f}",
            f"{s.redis_cpu_us:,.0f}, {s.client_cpu_us:,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def arithmetic(many_blocks: CaseFigures, many_workers: CaseFigures) -> str:
    """What 10,000 workers of 100,000 blocks need, from the one measured and from the scripts of a full node."""
    num_workers, step_s, busy, node_gib = 10_000, 0.020, 0.7, 32
    gib = num_workers * many_blocks.bytes_per_worker / GIB
    lines = [
        f"10,000 workers x 100,000 blocks: 10^9 blocks at {many_blocks.bytes_per_block:.0f} bytes each for pool and"
        f" index, {many_blocks.bytes_per_worker / 1e6:.2f} MB per worker with tables, rows and logs of 256 sequences:"
        f" {gib:.0f} GiB, or {math.ceil(gib / (busy * node_gib))} nodes of {node_gib} GiB filled to {busy:.0%}."
        f" A step of {1e3 * step_s:.0f} ms is {1 / step_s:.0f} scripts per second and worker,"
        f" {num_workers / step_s:,.0f} together."
    ]
    for s in many_workers.scripts:
        per_s = busy * 1e6 / s.redis_cpu_us
        nodes = math.ceil(num_workers / step_s / per_s)
        lines.append(
            f"With {s.num_rows} sequences in a step a script takes {s.redis_cpu_us:,.0f} us of a core: a node that is"
            f" {busy:.0%} busy serves {per_s:,.0f} scripts/s, {per_s * step_s:.0f} workers; that needs {nodes:,}"
            f" nodes, with {gib / nodes:.2f} GiB on each."
        )
    return "\n".join(lines)


@contextlib.asynccontextmanager
async def one_node(flags: argparse.Namespace, num_blocks: int, *settings: str) -> AsyncIterator[Fleet]:
    """A fleet on a server of its own."""
    server = RedisServer(flags.server, *settings)
    try:
        async with Fleet([server.start()], num_blocks, lambda _: 0) as fleet:
            yield fleet
    finally:
        server.close()


@contextlib.asynccontextmanager
async def three_nodes(flags: argparse.Namespace) -> AsyncIterator[Fleet]:
    """A fleet on a cluster of its own."""
    cluster = RedisCluster(flags.server)
    try:
        async with Fleet(cluster.start().nodes, NUM_BLOCKS, cluster.node_of) as fleet:
            yield fleet
    finally:
        cluster.close()


async def bench(flags: argparse.Namespace) -> list[CaseFigures]:
    """All cases, one after the other."""
    print(HEAD, flush=True)
    cases = []
    async with one_node(flags, NUM_BLOCKS) as fleet:
        await fleet.fill(1)
        cases.append(await measure_case("", fleet, flags))
    async with one_node(flags, MANY_BLOCKS) as fleet:
        await fleet.fill(max(1, flags.workers // 10))
        cases.append(many_blocks := await measure_case("", fleet, flags))
    async with one_node(flags, NUM_BLOCKS, *APPEND_ONLY) as fleet:
        await fleet.fill(flags.workers)
        cases.append(await measure_case("append-only", fleet, flags))
    async with three_nodes(flags) as fleet:
        await fleet.fill(flags.workers)
        cases.append(await measure_case("", fleet, flags))
    async with one_node(flags, NUM_BLOCKS) as fleet:
        await fleet.fill(flags.workers)
        cases.append(await measure_case("", fleet, flags))
        await fleet.grow(int(flags.gib * GIB))
        cases.append(many_workers := await measure_case("", fleet, flags))
    print(arithmetic(many_blocks, many_workers))
    return cases


def print_machine() -> str:
    """How fast the machine is now, and how much else it does."""
    line = f"{machine_line()}; load average {os.getloadavg()[0]:.1f}"
    print(line, flush=True)
    return line


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=server_binaries(), default="valkey")
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--gib", type=float, default=4.0, help="memory of one Redis to fill with workers")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="sequences in a step")
    parser.add_argument("--scripts", type=int, default=2000, help="scripts of each kind, at least")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers end too
    before = print_machine()
    cases = asyncio.run(bench(flags))
    after = print_machine()
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "before": before, "after": after}
        figures = {"server": flags.server, "cases": [asdict(case) for case in cases]}
        flags.json.write_text(json.dumps(about | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
