"""`make bench-overload`: ten times what the service can take: who is served is in time, the others are told when.

Workers wait instead of computing, so that load and service do not fight for the model's cores. First the knee: the
fastest rate at which 90 % of the requests keep every limit; then FACTOR times that. A good queue is short: it holds
what is served well within the limit for the first token (--max-waiting).
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.load.bench_step import machine_line
from tests.load.harness.backend import Backend, connect
from tests.load.harness.figures import is_good
from tests.load.harness.generator_figures import generator_figures
from tests.load.harness.knee import find_knee, good_share
from tests.load.harness.machine import describe_machine
from tests.load.harness.records import Outcome, Record
from tests.load.harness.run import Interrupt, RawRun, run_once
from tests.load.harness.settings import Dataset, Knee, Measures, Pace, Ramp, Settings, Target
from tests.load.harness.workload import ServedModel
from tests.stack import Stack, running
from tests.timed import make_timed_model

FACTOR = 10
STEP_S, MAX_NUM_SEQS, OUTPUT_TOKENS = 0.01, 8, 32
PLACES_PER_S = MAX_NUM_SEQS / (STEP_S * (OUTPUT_TOKENS + 1))
LIMITS_MS = (("ttft", 2000.0), ("tpot", 50.0))
MAX_WAITING = 16
"""Two thirds of a second's work: a third of the limit for the first token, for the machine may slow down as much."""
RAMP = Ramp("linear", 0.6 * PLACES_PER_S, 1.3 * PLACES_PER_S)
KNEE = Knee(goodput_share=0.9, stage_s=8.0, num_stages=8)


@dataclass(frozen=True)
class Overload:
    """What came of it. Rates in requests per second; goodput: good requests over the time in which all were due."""

    knee_rps: float
    goodput_at_knee_rps: float
    offered_rps: float
    goodput_rps: float
    completed_late: int
    refused: int
    told_when: int
    """Of those, how many got a RetryInfo."""
    mean_retry_delay_s: float
    failed_otherwise: dict[str, int]
    max_waiting: int
    """As the service's own counters said."""
    complaints: list[str]

    @property
    def kept(self) -> float:
        """Goodput over that at the knee."""
        return self.goodput_rps / self.goodput_at_knee_rps


def timed_stack(model: Path) -> Stack:
    """One worker that serves PLACES_PER_S, and a queue that is short."""
    flags = ("--timed-step-s", str(STEP_S), "--num-blocks", "2000", "--max-num-seqs", str(MAX_NUM_SEQS))
    return Stack(model, 1, ("--max-waiting", str(MAX_WAITING)), flags)


async def measure(stack: Stack, knee: Knee, ramp: Ramp = RAMP) -> Overload:
    """The knee, then FACTOR times it, each for as long as one stage of the knee."""
    settings = Settings(
        target=Target(address=stack.address),
        pace=Pace(ramp=ramp),
        dataset=Dataset(input_len=20, output_len=OUTPUT_TOKENS),
        measures=Measures(goodput_ms=LIMITS_MS),
        knee=knee,
        status_interval_s=0.1,
    )
    backend = connect(settings.target)
    try:
        run = _runner(backend, await backend.model())
        stages = await find_knee(settings, run)
        kept = [(rate, raw) for rate, raw in stages if good_share(raw) >= knee.goodput_share]
        rate, at_knee = kept[-1] if kept else stages[0]
        pace = Pace(request_rate=FACTOR * rate, duration_s=knee.stage_s)
        flood = await run(FACTOR * rate, replace(settings, pace=pace, knee=None, seed=100))
    finally:
        await backend.close()
    return _judge(rate, knee.stage_s, at_knee, flood)


def _runner(backend: Backend, model: ServedModel) -> Callable[[float, Settings], Awaitable[RawRun]]:
    async def run(rate: float, settings: Settings) -> RawRun:
        return await run_once(settings, backend, model, lambda *_: None, Interrupt())

    return run


def _judge(knee_rps: float, seconds: float, at_knee: RawRun, flood: RawRun) -> Overload:
    refused = [record for record in flood.records if record.status == "RESOURCE_EXHAUSTED"]
    others = [record for record in flood.records if record.outcome is Outcome.FAILED and record not in refused]
    delays_s = [record.retry_after_s for record in refused if record.retry_after_s is not None]
    num_completed = sum(record.outcome is Outcome.COMPLETED for record in flood.records)
    return Overload(
        knee_rps=knee_rps,
        goodput_at_knee_rps=_num_good(at_knee.records) / seconds,
        offered_rps=len(flood.records) / seconds,
        goodput_rps=_num_good(flood.records) / seconds,
        completed_late=num_completed - _num_good(flood.records),
        refused=len(refused),
        told_when=len(delays_s),
        mean_retry_delay_s=sum(delays_s) / max(1, len(delays_s)),
        failed_otherwise={record.status: sum(r.status == record.status for r in others) for record in others},
        max_waiting=max(sample.num_waiting for sample in flood.samples),
        complaints=list(generator_figures(flood.generations, flood.records)["complaints"]),  # type: ignore[call-overload]
    )


def _num_good(records: list[Record]) -> int:
    return sum(is_good(record, dict(LIMITS_MS)) for record in records)


async def bench() -> Overload:
    """One measurement on a stack of its own."""
    with tempfile.TemporaryDirectory() as folder:
        async with running(timed_stack(make_timed_model(Path(folder)))) as stack:
            found = await measure(stack, KNEE)
            await stack.idle()
            return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    print(machine_line())
    found = asyncio.run(bench())
    for name, value in asdict(found).items():
        print(f"{name:<22} {value if not isinstance(value, float) else format(value, '.2f')}")
    print(f"goodput at {FACTOR} times the knee: {found.kept:.0%} of the knee's (goal: 80 %)")
    print(machine_line())
    if flags.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        flags.json.write_text(json.dumps(about | asdict(found) | {"kept": found.kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
