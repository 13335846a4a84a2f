"""Workers in this process that run whole models on the emulated kernels."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from kernels import AttentionShape, self_check
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import Variant
from tests.kernels.cuda.backends import EMULATION
from tests.kernels.cuda.steps import MAX_PARTITIONS, PARTITION_LEN


@pytest.fixture
def worker_backend() -> Backend:
    """A test of another one parametrizes this name."""
    return EMULATION


@pytest.fixture
def emulated_worker(
    worker_backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """The worker tries them, as it does all native kernels, finds nothing wrong, and attends with them."""
    opened: list[Variant] = []

    def open_library(variant: Variant) -> KernelLibrary:
        opened.append(variant)
        return worker_backend.open_library(variant)

    def select(device: torch.device, shape: AttentionShape) -> CudaKernels:
        backend = dataclasses.replace(worker_backend, open_library=open_library)
        return CudaKernels(device, shape, backend, Tuning(PARTITION_LEN, MAX_PARTITIONS))

    monkeypatch.setattr(self_check, "select_kernels", select)
    yield
    assert opened
    assert not [record for record in caplog.records if record.name == "pagoda.kernels" and record.levelname == "ERROR"]
