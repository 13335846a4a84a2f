"""Workers in this process that run whole models on the emulated kernels."""

from collections.abc import Iterator

import pytest
import torch

from kernels import AttentionShape, self_check
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.library import KernelLibrary
from kernels.cuda.variant import Variant
from tests.kernels.cuda.steps import MAX_PARTITIONS, PARTITION_LEN, open_emulated


@pytest.fixture
def emulated_worker(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The worker tries them, as it does all native kernels, finds nothing wrong, and attends with them."""
    opened: list[Variant] = []

    def open_library(variant: Variant) -> KernelLibrary:
        opened.append(variant)
        return open_emulated(variant)

    def select(device: torch.device, shape: AttentionShape) -> CudaKernels:
        backend = Backend(open_library, lambda: 0)
        return CudaKernels(device, shape, backend, Tuning(PARTITION_LEN, MAX_PARTITIONS))

    monkeypatch.setattr(self_check, "select_kernels", select)
    yield
    assert opened
    assert not [record for record in caplog.records if record.name == "pagoda.kernels" and record.levelname == "ERROR"]
