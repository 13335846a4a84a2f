"""8-bit elements on CUDA, emulated: each is what torch says it is, and floats become what KVFormat makes of them."""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import build
from kernels.cuda import variant
from kernels.cuda.variant import EIGHT_BIT_ELEMENTS, EMULATION_HEADERS, Variant, emulated_library
from kernels.kv_format import LARGEST, KVFormat

SOURCE = Path(__file__).parent / "eight_bit.cu"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_element = pytest.mark.parametrize("kv_dtype", EIGHT_BIT_ELEMENTS, ids=name_of)


@functools.cache
def library() -> ctypes.CDLL:
    folder = variant.SOURCE.parent
    flags = (f"-I{folder}", *emulated_library(Variant(torch.float32, 64, 16)).flags)
    made = build.Library("eight_bit", ("g++",), flags, (SOURCE,), (*variant.HEADERS, *EMULATION_HEADERS))
    return ctypes.CDLL(str(build.shared_library(made)))


def all_elements(kv_dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256).to(torch.uint8).view(kv_dtype).float()


@each_element
def test_read_as_floats(kv_dtype: torch.dtype) -> None:
    found, expected = torch.empty(256), all_elements(kv_dtype)
    library()[f"read_{name_of(kv_dtype)}"](c_void_p(found.data_ptr()))
    assert torch.equal(found[expected.isfinite()], expected[expected.isfinite()])


@each_element
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_widened_to_operands(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """From either half of a register, whatever lies between."""
    found, expected = torch.empty(256, 2), all_elements(kv_dtype)
    library()[f"widen_{name_of(dtype)}_{name_of(kv_dtype)}"](c_void_p(found.data_ptr()))
    is_finite = expected.isfinite()
    assert torch.equal(found[is_finite], expected[is_finite, None].expand(-1, 2))


@each_element
def test_quantized_as_the_format_says(kv_dtype: torch.dtype) -> None:
    """Rows of all magnitudes; of zeros; too small for a scale; not finite; of the middles between two elements."""
    rng = torch.Generator().manual_seed(0)
    kv_format = KVFormat(kv_dtype, 1, 64, 16, 64)
    rows = torch.randn(2000, 64, generator=rng) * 2.0 ** torch.randint(-14, 1, (2000, 64), generator=rng)
    rows *= 2.0 ** torch.randint(-20, 20, (2000, 1), generator=rng)
    rows[0], rows[1], rows[2] = 0.0, rows[1] * 1e-38, rows[2] * 1e-43
    rows[3, 5], rows[4, 6], rows[5, 7] = float("nan"), float("inf"), float("-inf")
    elements = all_elements(kv_dtype).clamp(-LARGEST[kv_dtype], LARGEST[kv_dtype])
    elements = elements[elements.isfinite()].sort().values
    middles = (elements[:-1] + elements[1:]) / 2
    middles = middles[: len(middles) // 63 * 63].view(-1, 63)
    rows = torch.cat((rows, F.pad(middles, (1, 0), value=LARGEST[kv_dtype])))
    expected, scales = kv_format.quantize(rows)
    assert scales is not None
    found, spread = torch.empty(rows.shape, dtype=torch.uint8), scales[:, None].expand_as(rows).contiguous()
    pointers = (c_void_p(tensor.data_ptr()) for tensor in (rows, spread, found))
    library()[f"quantize_{name_of(kv_dtype)}"](*pointers, c_int64(rows.numel()))
    assert torch.equal(found, expected.view(torch.uint8))
