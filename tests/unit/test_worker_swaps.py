"""The worker's host pool: blocks go out and come back byte by byte, behind the steps before, and are reported once."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pagoda.v1 import worker_pb2 as pb

from kernels.kv_format import KVFormat
from tests.checkpoints import make_checkpoint
from tests.unit.worker_harness import LocalWorker
from worker.config import parse_config
from worker.errors import ConfigError, ProtocolError
from worker.host_pool import HostPool, count_host_blocks
from worker.kv_pool import FreeMemory, KVPool
from worker.swaps import NoSwaps, SwapThread
from worker.wire import SwapReport, decode_plan, encode_swaps

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])


def a_pool(num_blocks: int = 6, device: str = "cpu") -> KVPool:
    pool = KVPool(3, num_blocks, KVFormat(torch.float32, 2, 8, 16, 1), torch.device(device))
    pool.blocks.copy_(torch.randint(0, 256, pool.blocks.shape, dtype=torch.uint8))
    return pool


def a_plan(outs: dict[int, int], ins: dict[int, int], step_id: int = 1) -> pb.StepPlan:
    """Swaps as {source: destination}."""
    return pb.StepPlan(
        epoch=7,
        step_id=step_id,
        out_block_ids=list(outs),
        out_host_block_ids=list(outs.values()),
        in_host_block_ids=list(ins),
        in_block_ids=list(ins.values()),
    )


class Reporter:
    """Collects reports, and what a thread raised."""

    def __init__(self) -> None:
        self.reports: list[SwapReport] = []
        self.error: Exception | None = None
        self.ended = threading.Event()

    def report_swaps(self, report: SwapReport) -> None:
        self.reports.append(report)

    def guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            self.error = error
            self.ended.set()


class GatedCopier:
    """Copies when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.done: list[tuple[str, object]] = []
        self.num_marks = 0

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def copy_out(self, block_ids: np.ndarray, host_block_ids: np.ndarray, after: object) -> None:
        self.gate.acquire()
        self.done.append(("out", after))

    def copy_in(self, host_block_ids: np.ndarray, block_ids: np.ndarray, after: object) -> None:
        self.gate.acquire()
        self.done.append(("in", after))


@each_device
def test_a_block_comes_back_as_it_went_out(device: str) -> None:
    pool = a_pool(device=device)
    host, before = HostPool(4, pool), pool.blocks.clone()
    assert host.blocks.is_pinned() == (device == "cuda")
    copier = host.copier()
    copier.copy_out(np.array([1, 5]), np.array([4, 2]), copier.mark())
    pool.poison()
    copier.copy_in(np.array([2, 4]), np.array([3, 6]), copier.mark())
    assert torch.equal(pool.blocks[:, :, 3], before[:, :, 5])
    assert torch.equal(pool.blocks[:, :, 6], before[:, :, 1])
    others = pool.blocks[:, :, [0, 1, 2, 4, 5]]
    assert torch.equal(others, torch.full_like(others, int(others.flatten()[0]))), "nothing else was written"


@each_device
def test_measuring_leaves_the_pool_as_it_was(device: str) -> None:
    pool = a_pool(device=device)
    before = pool.blocks.clone()
    assert HostPool(3, pool).measure() > 0
    assert torch.equal(pool.blocks, before)


def test_swaps_run_in_the_order_of_plans_and_are_reported_by_their_destinations() -> None:
    reporter, copier = Reporter(), GatedCopier()
    swaps = SwapThread(copier, 6, 4, reporter)
    swaps.begin(decode_plan(a_plan({}, {})))
    for plan in (a_plan({3: 1}, {2: 5}), a_plan({}, {1: 6})):
        swaps.begin(decode_plan(plan))
    assert copier.num_marks == 2, "one for each plan that swaps, when it begins"
    copier.gate.release(3)
    swaps.settle()
    assert copier.done == [("out", 1), ("in", 1), ("in", 2)]
    sent = [encode_swaps(report).swaps_done for report in reporter.reports]
    assert [(m.epoch, list(m.host_block_ids), list(m.block_ids)) for m in sent] == [(7, [1], [5]), (7, [], [6])]
    assert all(report.seconds >= 0 for report in reporter.reports)


def test_settling_waits_for_all_that_is_under_way() -> None:
    reporter, copier = Reporter(), GatedCopier()
    swaps = SwapThread(copier, 6, 4, reporter)
    swaps.begin(decode_plan(a_plan({3: 1}, {})))
    settled = threading.Event()
    threading.Thread(target=lambda: (swaps.settle(), settled.set()), daemon=True).start()
    assert not settled.wait(0.05)
    copier.gate.release()
    assert settled.wait(10.0)
    assert len(reporter.reports) == 1


def test_a_copy_that_fails_ends_the_process_and_leaves_nobody_waiting() -> None:
    reporter = Reporter()
    pool = a_pool()
    swaps = SwapThread(HostPool(4, pool).copier(), 60, 4, reporter)  # more blocks than there are
    swaps.begin(decode_plan(a_plan({50: 1}, {})))
    assert reporter.ended.wait(10.0)
    assert isinstance(reporter.error, IndexError)
    swaps.settle()


@pytest.mark.parametrize(
    ("outs", "ins"), [({0: 1}, {}), ({7: 1}, {}), ({1: 5}, {}), ({1: 0}, {}), ({}, {5: 1}), ({}, {1: 7})]
)
def test_blocks_that_are_not_there_are_refused(outs: dict[int, int], ins: dict[int, int]) -> None:
    swaps = SwapThread(GatedCopier(), 6, 4, Reporter())
    with pytest.raises(ProtocolError, match="plan 1 swaps blocks"):
        swaps.check(decode_plan(a_plan(outs, ins)))
    swaps.check(decode_plan(a_plan({1: 4}, {4: 6})))


def test_columns_that_differ_are_refused() -> None:
    for plan in (pb.StepPlan(out_block_ids=[1]), pb.StepPlan(in_block_ids=[1, 2], in_host_block_ids=[1])):
        with pytest.raises(ProtocolError):
            decode_plan(plan)


def test_without_a_host_pool_a_swap_is_refused() -> None:
    NoSwaps().check(decode_plan(a_plan({}, {})))
    with pytest.raises(ProtocolError, match="no host pool"):
        NoSwaps().check(decode_plan(a_plan({1: 1}, {})))


def test_sizes_come_from_bytes_or_blocks_and_must_fit() -> None:
    free = FreeMemory(default_bytes=1000, most_bytes=5000)
    assert count_host_blocks(None, None, 100, free) == 10
    assert count_host_blocks(2050, None, 100, free) == 20
    assert count_host_blocks(None, 0, 100, free) == 0
    with pytest.raises(ConfigError, match="host-memory=5100: 5000 bytes"):
        count_host_blocks(None, 51, 100, free)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--host-memory", "-1"), "host-memory"),
        (("--num-host-blocks", "-1"), "num-host-blocks"),
        (("--num-host-blocks", "1", "--host-memory", "1GiB"), "give one of them"),
    ],
)
def test_a_bad_size_is_named(flags: tuple[str, ...], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_config(["--scheduler", "unix:/s", "--model", "m", *flags])


def test_a_worker_registers_its_host_pool_and_what_it_measured(tmp_path: Path) -> None:
    model = make_checkpoint("llama3", tmp_path)
    flags = ("--model", str(model), "--dtype", "float32", "--num-blocks", "20")
    description = LocalWorker(*flags, "--num-host-blocks", "7").description
    assert description.pool.num_host_blocks == 7
    assert description.speed.swap_bytes_per_s > 0
    assert description.speed.s_per_token > 0
    bare = LocalWorker(*flags).description
    assert (bare.pool.num_host_blocks, bare.speed.swap_bytes_per_s) == (0, 0.0)
