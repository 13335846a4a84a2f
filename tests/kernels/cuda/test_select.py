"""When CUDA kernels are chosen, without a GPU: by capability, shape and compiler; and what the log says otherwise."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kernels import AttentionShape, build, select_kernels
from kernels.cuda.attention import CudaKernels
from kernels.cuda.variant import SHARED_KIB, USUAL_SHARED_KIB, Variant, device_library
from kernels.reference import ReferenceKernels

SHAPE = AttentionShape(8, 2, 64, 16, 0.125, torch.bfloat16, torch.bfloat16)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU of capability 9.0, nvcc, and nothing made ahead."""
    monkeypatch.setenv("PAGODA_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(build, "find_compiler", lambda commands: "/usr/bin/nvcc")
    monkeypatch.setattr(CudaKernels, "__init__", lambda self, *args: None)


def test_native_kernels_serve_where_they_can() -> None:
    assert isinstance(select_kernels(DEVICE, SHAPE), CudaKernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_kv_is_served_beside_any_dtype(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    assert isinstance(select_kernels(DEVICE, dataclasses.replace(SHAPE, dtype=dtype, kv_dtype=kv_dtype)), CudaKernels)


@pytest.mark.parametrize(("dtype", "serving"), [(torch.float32, CudaKernels), (torch.bfloat16, ReferenceKernels)])
def test_float32_needs_no_multiples_of_16(dtype: torch.dtype, serving: type) -> None:
    shape = dataclasses.replace(SHAPE, head_dim=24, dtype=dtype, kv_dtype=dtype)
    assert isinstance(select_kernels(DEVICE, shape), serving)


@pytest.mark.parametrize(
    "variant", [Variant(torch.bfloat16, 64, 16), Variant(torch.float16, 64, 16, kv_dtype=torch.int8)]
)
def test_what_was_made_ahead_needs_no_compiler(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda commands: None)
    (tmp_path / f"{device_library(variant, (9, 0)).name}-0123456789abcdef-01234567.so").touch()
    assert isinstance(select_kernels(DEVICE, SHAPE), CudaKernels)


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        ("compiler", "no nvcc"),
        ("capability", "compute capability 7.5"),
        ("head_dim", "head_dim 20"),
        ("group", "17 heads per KV head"),
        ("kv_dtype", "KV of torch.float16 beside torch.bfloat16"),
    ],
)
def test_else_the_reference_serves_and_the_log_says_why(
    lack: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = SHAPE
    if lack == "compiler":
        monkeypatch.setattr(build, "find_compiler", lambda commands: None)
    elif lack == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    elif lack == "head_dim":
        shape = dataclasses.replace(SHAPE, head_dim=20)
    elif lack == "kv_dtype":
        shape = dataclasses.replace(SHAPE, kv_dtype=torch.float16)
    else:
        shape = dataclasses.replace(SHAPE, num_heads=17, num_kv_heads=1)
    assert isinstance(select_kernels(DEVICE, shape), ReferenceKernels)
    assert [record.name for record in caplog.records] == ["pagoda.kernels"]
    assert said in caplog.text


def test_shared_memory_follows_the_architecture() -> None:
    usual = USUAL_SHARED_KIB
    for head_dim, capability, kib in [
        *((128, (8, 9), SHARED_KIB[8, 9]), (128, (9, 0), usual), (128, (10, 0), usual)),
        *((128, (8, 0), 81), (256, (8, 0), usual)),
    ]:
        library = device_library(Variant(torch.bfloat16, head_dim, 16), capability)
        assert f"-DPAGODA_SHARED_KIB={kib}" in library.flags
        assert f"-arch=sm_{capability[0]}{capability[1]}" in library.flags
