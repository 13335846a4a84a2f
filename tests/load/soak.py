"""`make soak`: 500 streams at once through `pagoda up` on the demo model, some cancelled, some left, for ten minutes.

At the end every request is accounted for, every block is free or cached, no stream is left, and the scheduler's memory
has not grown: its resident size over the last tenth of the run is that over the third, but for SLACK_MIB.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.load.harness.backend import ServerSample, connect
from tests.load.harness.figures import max_concurrency
from tests.load.harness.generator import Counts
from tests.load.harness.machine import describe_machine
from tests.load.harness.run import Interrupt, RawRun, run_once
from tests.load.harness.settings import Dataset, Leavers, Pace, Settings, Target
from tests.stack import ROOT, free_port

MODEL = ROOT / "deploy/demo/model"
NUM_STREAMS = 500
UP_FLAGS = ("--record-ttl-s", "30", "--num-blocks", "6000")
"""A pool that is full of cached blocks within the first minutes: what is kept of each does not grow from then on."""
LEAVERS = Leavers(cancel_share=0.1, disconnect_share=0.1, after_tokens=8)
SLACK_MIB = 8.0
START_TIMEOUT_S = 120.0
RSS_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Soaked:
    """What came of it."""

    seconds: float
    outcomes: dict[str, int]
    errors: dict[str, int]
    num_output_tokens: int
    max_concurrency: int
    """Streams that were open at once."""
    after: dict[str, int]
    """The service's counters when all was over."""
    rss_mib: list[float]
    """Of the scheduler, the median over each tenth of the run."""

    @property
    def growth_mib(self) -> float:
        """From the third tenth, when all that is kept of ended requests is full, to the last."""
        return self.rss_mib[-1] - self.rss_mib[2]

    def complaints(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if self.outcomes.get("failed"):
            found.append(f"requests failed: {self.errors}")
        left = {name: count for name, count in self.after.items() if name not in ("free", "cached", "blocks") and count}
        if left:
            found.append(f"left behind: {left}")
        if self.after["free"] + self.after["cached"] != self.after["blocks"]:
            found.append(f"blocks are missing: {self.after}")
        return found


@contextlib.asynccontextmanager
async def pagoda_up(folder: Path, *more: str) -> AsyncIterator[tuple[int, int]]:
    """(port, the scheduler's process id) of the demo model's service, ended afterwards."""
    port, pids = free_port(), folder / "pids.json"
    flags = ("--port", str(port), "--model", str(MODEL), "--pids", str(pids), *more)
    command = [sys.executable, "-m", "deploy.cli", "up", *flags]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        assert line.startswith(b"pagoda: ready"), line
        yield port, json.loads(pids.read_text())["scheduler"]
    finally:
        process.terminate()
        await process.wait()


async def soak(seconds: float, num_streams: int = NUM_STREAMS, output_len: int | None = None) -> Soaked:
    """Runs it on a service of its own. `output_len`: mean tokens of an answer, where not those of Alpaca."""
    with tempfile.TemporaryDirectory() as folder:
        async with pagoda_up(Path(folder), *UP_FLAGS) as (port, scheduler_pid):
            settings = Settings(
                target=Target(address=f"127.0.0.1:{port}", stream_interval=8),
                pace=Pace(max_concurrency=num_streams, duration_s=seconds, num_prompts=5000),
                dataset=Dataset("alpaca", output_len=output_len),
                leavers=LEAVERS,
            )
            rss_mib: list[float] = []
            watching = asyncio.create_task(_watch(psutil.Process(scheduler_pid), rss_mib))
            backend = connect(settings.target)
            try:
                run = await run_once(settings, backend, await backend.model(), _Lines().show, Interrupt())
            finally:
                watching.cancel()
                await backend.close()
            return _judge(run, rss_mib)


async def _watch(process: psutil.Process, rss_mib: list[float]) -> None:
    while True:
        rss_mib.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(RSS_INTERVAL_S)


class _Lines:
    """A line now and then."""

    def __init__(self) -> None:
        self._next_s = PROGRESS_INTERVAL_S

    def show(self, counts: Counts, sample: ServerSample | None, elapsed_s: float) -> None:
        """See run.Show."""
        if elapsed_s >= self._next_s:
            self._next_s += PROGRESS_INTERVAL_S
            sys.stderr.write(f"{elapsed_s:.0f} s: {counts.num_sent} sent, {counts.num_failed} failed\n")


def _judge(run: RawRun, rss_mib: list[float]) -> Soaked:
    records, last = run.records, run.samples[-1]
    tenth = max(1, len(rss_mib) // 10)
    return Soaked(
        seconds=time.monotonic() - run.start_s,
        outcomes=dict(Counter(record.outcome.value for record in records)),
        errors=dict(Counter(f"{record.status}: {record.detail}" for record in records if record.status)),
        num_output_tokens=sum(record.num_output_tokens for record in records),
        max_concurrency=max_concurrency(records),
        after={
            "running": last.num_running,
            "waiting": last.num_waiting,
            "live requests": last.num_live_requests,
            "streams": last.num_streams,
            "blocks": sum(run.samples[0].blocks.values()),
            **last.blocks,
        },
        rss_mib=[round(statistics.median(rss_mib[i * tenth : (i + 1) * tenth]), 1) for i in range(10)],
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    found = asyncio.run(soak(flags.seconds, flags.streams))
    for name, value in asdict(found).items():
        print(f"{name:<18} {value}")
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        flags.json.write_text(json.dumps(about | asdict(found), indent=1) + "\n")
    grown = [f"the scheduler grew by {found.growth_mib:.1f} MiB"] if found.growth_mib > SLACK_MIB else []
    if complaints := found.complaints() + grown:
        raise SystemExit("; ".join(complaints))


if __name__ == "__main__":
    main()
