"""The C ABI of library.cu, in ctypes: structures field by field, calls that raise.

Owns nothing on the device: callers keep tensors alive until the stream has passed their launch, as torch's allocator
does for tensors freed on the same stream.
"""

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from kernels import KernelError
from kernels.build import load


class Facts(Structure):
    """struct Facts."""

    attention_args_bytes: int
    block_copy_args_bytes: int
    rotate_args_bytes: int
    norm_args_bytes: int
    gate_args_bytes: int
    greedy_args_bytes: int
    decode_rows: int
    prefill_rows: int
    decode_blocks: int

    _fields_ = [
        ("attention_args_bytes", c_int32),
        ("block_copy_args_bytes", c_int32),
        ("rotate_args_bytes", c_int32),
        ("norm_args_bytes", c_int32),
        ("gate_args_bytes", c_int32),
        ("greedy_args_bytes", c_int32),
        ("decode_rows", c_int32),
        ("prefill_rows", c_int32),
        ("decode_blocks", c_int32),
    ]


class AttentionArgs(Structure):
    """struct AttentionArgs; its fields are described in arguments.cuh."""

    _fields_ = [
        ("query", c_void_p),
        ("out", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("cu_seqlens_q", c_void_p),
        ("decode_items", c_void_p),
        ("unit_starts", c_void_p),
        ("prefill_items", c_void_p),
        ("partial_sums", c_void_p),
        ("partial_stats", c_void_p),
        ("arrivals", c_void_p),
        ("stream", c_void_p),
        ("query_stride", c_int64),
        ("block_table_stride", c_int32),
        ("num_units", c_int32),
        ("num_prefill_items", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("sliding_window", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
    ]


class BlockCopyArgs(Structure):
    """struct BlockCopyArgs; its fields are described in copy.cuh."""

    _fields_ = [
        ("pool", c_void_p),
        ("copies", c_void_p),
        ("stream", c_void_p),
        ("num_blocks", c_int64),
        ("num_copies", c_int32),
        ("num_planes", c_int32),
        ("num_kv_heads", c_int32),
    ]


class RotateArgs(Structure):
    """struct RotateArgs; its fields are described in rotate.cuh."""

    _fields_ = [
        ("heads", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("slot_mapping", c_void_p),
        ("stream", c_void_p),
        ("heads_stride", c_int64),
        ("num_tokens", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("norm_epsilon", c_float),
    ]


class NormArgs(Structure):
    """struct NormArgs; its fields are described in norm.cuh."""

    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        ("stream", c_void_p),
        ("num_rows", c_int32),
        ("size", c_int32),
        ("epsilon", c_float),
    ]


class GateArgs(Structure):
    """struct GateArgs; its fields are described in gate.cuh."""

    _fields_ = [
        ("gate_up", c_void_p),
        ("y", c_void_p),
        ("stream", c_void_p),
        ("num_rows", c_int32),
        ("size", c_int32),
    ]


class GreedyArgs(Structure):
    """struct GreedyArgs; its fields are described in greedy.cuh."""

    _fields_ = [
        ("logits", c_void_p),
        ("choices", c_void_p),
        ("stream", c_void_p),
        ("num_rows", c_int32),
        ("vocab_size", c_int32),
    ]


class KernelLibrary:
    """One variant, loaded and opened on the current device. Raises BuildError or KernelError where that can't be."""

    def __init__(self, path: Path) -> None:
        self._library = load(path)
        self._library.pagoda_error.restype = ctypes.c_char_p
        self._attend = self._declare("pagoda_attend", AttentionArgs)
        self._copy_blocks = self._declare("pagoda_copy_blocks", BlockCopyArgs)
        self._rotate = self._declare("pagoda_rotate", RotateArgs)
        self._norm = self._declare("pagoda_norm", NormArgs)
        self._gate = self._declare("pagoda_gate", GateArgs)
        self._greedy = self._declare("pagoda_greedy", GreedyArgs)
        self.facts = Facts()
        self._check(self._declare("pagoda_open", Facts)(self.facts))
        assert self.facts.attention_args_bytes == ctypes.sizeof(AttentionArgs)
        assert self.facts.block_copy_args_bytes == ctypes.sizeof(BlockCopyArgs)
        assert self.facts.rotate_args_bytes == ctypes.sizeof(RotateArgs)
        assert self.facts.norm_args_bytes == ctypes.sizeof(NormArgs)
        assert self.facts.gate_args_bytes == ctypes.sizeof(GateArgs)
        assert self.facts.greedy_args_bytes == ctypes.sizeof(GreedyArgs)

    def attend(self, args: AttentionArgs) -> None:
        """Start decode and prefill attention. Raises KernelError, as all calls do."""
        self._check(self._attend(args))

    def copy_blocks(self, args: BlockCopyArgs) -> None:
        """Start one run of independent copies."""
        self._check(self._copy_blocks(args))

    def rotate(self, args: RotateArgs) -> None:
        """Start norms on heads, rotary embedding and KV write."""
        self._check(self._rotate(args))

    def norm(self, args: NormArgs) -> None:
        """Start root mean square norms of rows."""
        self._check(self._norm(args))

    def gate(self, args: GateArgs) -> None:
        """Start SiLU(gate) * up of rows."""
        self._check(self._gate(args))

    def greedy(self, args: GreedyArgs) -> None:
        """Start the choice of each row's most likely token."""
        self._check(self._greedy(args))

    def seed_emulation(self, seed: int) -> None:
        """Order of threads and blocks from now on; an emulated library only."""
        self._library.pagoda_emulation_seed(ctypes.c_uint64(seed))

    def _declare(self, name: str, structure: type[Structure]) -> "ctypes._NamedFuncPointer":
        function = self._library[name]
        function.argtypes = [ctypes.POINTER(structure)]
        function.restype = ctypes.c_int
        return function

    def _check(self, status: int) -> None:
        if status != 0:
            raise KernelError(self._library.pagoda_error(ctypes.c_int(status)).decode())
