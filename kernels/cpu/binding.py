"""The C functions of the CPU kernels, through ctypes.

Owns the structures that mirror `attention.h`. They hold bare addresses: who fills one keeps the arrays alive.
"""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kernels import AttentionShape
from kernels.build import load


def address(array: NDArray[Any]) -> int:
    """Of its first element; `array.ctypes` would tell it by way of objects."""
    found: int = array.__array_interface__["data"][0]
    return found


class Shape(ctypes.Structure):
    """See `attention.h`."""

    _fields_ = (
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size")),
        *((name, c_float) for name in ("scale", "soft_cap")),
    )


class Work(ctypes.Structure):
    """See `attention.h`."""

    _fields_ = (
        *((name, c_int32) for name in ("num_clusters", "num_merges", "table_stride", "sliding_window", "num_threads")),
        *((name, c_void_p) for name in ("cluster_starts", "order", "seqs", "query_starts")),
        *((name, c_void_p) for name in ("num_queries", "kv_starts", "kv_ends", "partials")),
        *((name, c_void_p) for name in ("merge_items", "merge_counts")),
        *((name, c_void_p) for name in ("block_tables", "context_lens", "cu_seqlens_q")),
    )


class Call(ctypes.Structure):
    """See `attention.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "keys", "values", "output", "partial_sums", "partial_norms")),
        ("query_stride", c_int64),
    )


class RotateCall(ctypes.Structure):
    """See `attention.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("heads", "cos", "sin", "query_norm", "key_norm", "keys", "values")),
        ("slot_mapping", c_void_p),
        ("heads_stride", c_int64),
        ("num_tokens", c_int64),
        ("norm_epsilon", c_float),
        ("num_threads", c_int32),
    )


class LinearWeight(ctypes.Structure):
    """See `Linear` in `linear.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int32) for name in ("num_inputs", "num_outputs")),
    )


class Sketch(ctypes.Structure):
    """See `sketch.h`."""

    _fields_ = tuple((name, c_void_p) for name in ("quads", "steps", "lengths", "gaps"))


class LinearCall(ctypes.Structure):
    """See `linear.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("input", "norm_weight", "output")),
        *((name, c_int64) for name in ("input_stride", "output_stride", "num_rows", "readable_rows")),
        ("norm_epsilon", c_float),
        *((name, c_int32) for name in ("input_kind", "output_kind", "num_threads")),
        ("sketch", POINTER(Sketch)),
    )


class Layer(ctypes.Structure):
    """See `layers.h`."""

    _fields_ = (
        *((name, LinearWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm", "keys", "values")),
        *((name, c_float) for name in ("norm_epsilon", "head_norm_epsilon")),
        ("window", c_int32),
    )


class WindowWork(ctypes.Structure):
    """See `layers.h`."""

    _fields_ = (("work", POINTER(Work)), ("partial_sums", c_void_p), ("partial_norms", c_void_p))


class LayersCall(ctypes.Structure):
    """See `layers.h`."""

    _fields_ = (
        ("shape", POINTER(Shape)),
        ("layers", POINTER(Layer)),
        ("windows", POINTER(WindowWork)),
        *((name, c_void_p) for name in ("hidden", "heads", "attended", "gated", "cos", "sin", "slot_mapping")),
        *((name, c_void_p) for name in ("output_rows", "output")),
        *((name, c_int64) for name in ("num_tokens", "num_outputs")),
        ("num_layers", c_int32),
        ("num_threads", c_int32),
    )


class SampleCall(ctypes.Structure):
    """See `sample.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "rows", "temperatures", "top_k", "top_p", "min_p", "uniforms")),
        ("token_ids", c_void_p),
        *((name, c_int64) for name in ("num_draws", "vocab_size")),
        ("num_threads", c_int32),
    )


class StepsCall(ctypes.Structure):
    """See `steps.h`."""

    _fields_ = (
        ("layers", POINTER(LayersCall)),
        *((name, c_void_p) for name in ("cos", "sin", "slot_mapping", "kv_ends", "context_lens", "item_seqs")),
        *((name, c_void_p) for name in ("block_tables", "embedding", "all_cos", "all_sin")),
        ("lm_head", POINTER(LinearWeight)),
        ("sketch", POINTER(Sketch)),
        *((name, c_void_p) for name in ("norm", "choices")),
        ("sample", POINTER(SampleCall)),
        *((name, c_void_p) for name in ("logits", "steps_each")),
        ("table_stride", c_int64),
        ("num_items", c_int32),
        ("num_steps", c_int32),
        ("norm_epsilon", c_float),
    )


class NativeLibrary:
    """The functions of one loaded library. Raises BuildError where it can't be loaded."""

    def __init__(self, path: Path) -> None:
        library = load(path)
        self.attend = library.pagoda_attend
        self.attend.argtypes = (POINTER(Shape), POINTER(Work), POINTER(Call))
        self.attend.restype = None
        self.rotate_and_write = library.pagoda_rotate_and_write
        self.rotate_and_write.argtypes = (POINTER(Shape), POINTER(RotateCall))
        self.rotate_and_write.restype = None
        self.linear = library.pagoda_linear
        self.linear.argtypes = (POINTER(LinearWeight), POINTER(LinearCall))
        self.linear.restype = None
        self.run_layers = library.pagoda_run_layers
        self.run_layers.argtypes = (POINTER(LayersCall),)
        self.run_layers.restype = None
        self.run_steps = library.pagoda_run_steps
        self.run_steps.argtypes = (POINTER(StepsCall),)
        self.run_steps.restype = None
        self.greedy = library.pagoda_greedy
        self.greedy.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32)
        self.greedy.restype = None
        self.sample = library.pagoda_sample
        self.sample.argtypes = (POINTER(SampleCall),)
        self.sample.restype = None
        self.pack = library.pagoda_pack
        self.pack.argtypes = (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32)
        self.pack.restype = None
        self.packed_size = library.pagoda_packed_size
        self.packed_size.argtypes = (c_int32, c_int32)
        self.packed_size.restype = c_int64
        self.sketch_bytes = library.pagoda_sketch_bytes
        self.sketch_bytes.argtypes = (c_int32, c_int32)
        self.sketch_bytes.restype = c_int64
        self.sketch = library.pagoda_sketch
        self.sketch.argtypes = (POINTER(LinearWeight), POINTER(Sketch), c_int32)
        self.sketch.restype = None
        self.key_group: int = library.pagoda_key_group()
        self.value_group: int = library.pagoda_value_group()
        self.copy_blocks = library.pagoda_copy_blocks
        self.copy_blocks.argtypes = (POINTER(Shape), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32)
        self.copy_blocks.restype = None
        self.stream_read = library.pagoda_stream_read
        self.stream_read.argtypes = (c_void_p, c_int64, c_int32)
        self.stream_read.restype = c_float


def c_shape(shape: AttentionShape) -> Shape:
    """The part of it that the library was not compiled for."""
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size
    return Shape(*sizes, shape.scale, shape.soft_cap)
