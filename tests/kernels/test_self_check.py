"""Kernels that are wrong on a machine do not serve there."""

import logging
from collections.abc import Sequence

import pytest
import torch

import kernels.self_check
from kernels import (
    Angles,
    AttentionMetadata,
    AttentionShape,
    AttentionStep,
    BlockCopy,
    Draws,
    GatedLinear,
    HeadNorms,
    KernelError,
    Kernels,
    LayerKV,
    Linear,
    select_kernels,
)
from kernels.build import BuildError
from kernels.layers import UnfusedStep
from kernels.reference import ReferenceKernels
from kernels.self_check import checked_kernels, limit, relative_difference

CPU = torch.device("cpu")
SHAPE = AttentionShape(6, 2, 64, 16, 0.125, torch.float32, torch.float32)


class Broken:
    """The reference, but for one mistake."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake
        self.kernels = ReferenceKernels(CPU, SHAPE)
        self.kv_format = self.kernels.kv_format

    def prepare(self, metadata: AttentionMetadata) -> AttentionStep:
        if self.mistake == "does not compile":
            raise BuildError("nvcc ended with 1")
        if self.mistake == "does not start":
            raise KernelError("the driver is too old")
        return BrokenStep(self.mistake, self.kernels.prepare(metadata))

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return self.kernels.linear(weight, None if self.mistake == "adds no bias" else bias)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> GatedLinear:
        return self.kernels.gated(weight, None if self.mistake == "gates without bias" else bias)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        return self.kernels.greedy(-logits if self.mistake == "takes the least likely" else logits)

    def sample(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        return self.kernels.sample(logits.roll(1, 1) if self.mistake == "samples a neighbour" else logits, draws)

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        if self.mistake != "copies nothing":
            self.kernels.copy_blocks(pool, copies)


class BrokenStep(UnfusedStep):
    def __init__(self, mistake: str, step: AttentionStep) -> None:
        self.mistake = mistake
        self.step = step

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        if self.mistake == "turns the wrong way":
            angles = Angles(angles.cos, -angles.sin)
        return self.step.rotate_and_write(heads, angles, None if self.mistake == "norms no head" else norms, layer)

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        output = self.step.attend(query, layer, 0 if self.mistake == "sees past its window" else sliding_window)
        if self.mistake == "leaves a NaN":
            output[-1, -1, -1] = float("nan")
        if self.mistake == "loses a partition":
            output[2] *= 0.9
        return output


def serving(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.message for record in caplog.records if record.levelno >= logging.ERROR)


@pytest.mark.parametrize(
    "mistake",
    [
        *("copies nothing", "turns the wrong way", "norms no head", "sees past its window", "leaves a NaN"),
        *("loses a partition", "adds no bias", "gates without bias", "takes the least likely", "samples a neighbour"),
    ],
)
def test_wrong_kernels_do_not_serve(
    mistake: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.self_check, "select_kernels", lambda device, shape: Broken(mistake))
    assert isinstance(checked_kernels(CPU, SHAPE, (0, 20)), ReferenceKernels)
    assert "wrong here (cpu, torch.float32, KV torch.float32, window" in serving(caplog)


@pytest.mark.parametrize(
    ("mistake", "said"), [("does not compile", "nvcc ended with 1"), ("does not start", "the driver is too old")]
)
def test_kernels_that_do_not_run_do_not_serve(
    mistake: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.self_check, "select_kernels", lambda device, shape: Broken(mistake))
    assert isinstance(checked_kernels(CPU, SHAPE, (0,)), ReferenceKernels)
    assert f"not to be used: {said}" in serving(caplog)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((torch.bfloat16, torch.int8), (torch.float32, torch.float8_e4m3fn)),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_right_kernels_do(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    shape = AttentionShape(8, 2, head_dim, 16, head_dim**-0.5, dtype, kv_dtype)
    found: Kernels = checked_kernels(CPU, shape, (0, 33))
    assert type(found) is type(select_kernels(CPU, shape))
    assert serving(caplog) == ""
    assert relative_difference(found, CPU, shape, 0) < limit(shape) / 2, "rounding has room"
