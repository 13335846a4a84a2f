"""Native kernels are tried against the reference before they serve: on this machine, in this build, for this model.

Owns one mixed step over a small pool: decodes short and long enough to be split, two that share a prefix, prompts whole
and in part, blocks in shuffled order, NaN in every slot that nobody wrote; and one small matrix in all its uses. It
takes milliseconds.
"""

import logging
from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import (
    Angles,
    AttentionMetadata,
    AttentionShape,
    BlockCopy,
    Draws,
    HeadNorms,
    KernelError,
    Kernels,
    LayerKV,
    Norm,
    select_kernels,
)
from kernels.build import BuildError
from kernels.kv_format import NAN_BYTE, KVFormat
from kernels.reference import ReferenceKernels

log = logging.getLogger("pagoda.kernels")

# (KV tokens, query tokens) of each sequence. The last one begins with blocks of the third: they are read once for both.
SEQUENCES = ((1, 1), (37, 1), (600, 1), (16, 16), (70, 30), (590, 1))
SHARED_TOKENS = 512
# Inputs and outputs of the matrix: whole vectors and a rest of each.
MATRIX = (83, 45)
EPSILON = 1e-5
# Relative difference of all outputs together (Frobenius norm) that rounding can explain, by dtype.
LIMITS = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
    torch.int8: 1e-2,
    torch.float8_e4m3fn: 4e-2,
}


def checked_kernels(device: torch.device, shape: AttentionShape, sliding_windows: Collection[int]) -> Kernels:
    """`select_kernels`, or the reference where those are wrong here: then the log says so, as an error."""
    kernels = select_kernels(device, shape)
    if isinstance(kernels, ReferenceKernels):
        return kernels
    try:
        for sliding_window in sorted(set(sliding_windows)):
            difference = relative_difference(kernels, device, shape, sliding_window)
            if not difference <= limit(shape):
                dtypes = f"{shape.dtype}, KV {shape.kv_dtype}"
                lack = f"wrong here ({device}, {dtypes}, window {sliding_window}: off by {difference:.2g})"
                break
        else:
            return kernels
    except (BuildError, KernelError) as error:  # a variant is compiled when it is first met
        lack = f"not to be used: {error}"
    log.error("the native kernels are %s; the reference serves, many times slower", lack)
    return ReferenceKernels(device, shape)


def limit(shape: AttentionShape) -> float:
    """Of the relative difference: rounding of activations, and of KV that lies between two elements."""
    return max(LIMITS[shape.dtype], LIMITS[shape.kv_dtype])


def relative_difference(kernels: Kernels, device: torch.device, shape: AttentionShape, sliding_window: int) -> float:
    """Of the step's outputs from the reference's, over the norm of these; NaN where any is NaN."""
    step = _Step(device, shape)
    wanted = step.run(ReferenceKernels(device, shape), sliding_window)
    found = step.run(kernels, sliding_window)
    return float((found - wanted).norm() / wanted.norm())


class _Step:
    """The same inputs for all kernels."""

    def __init__(self, device: torch.device, shape: AttentionShape) -> None:
        rng = np.random.default_rng(0)
        context_lens, query_lens = np.array(SEQUENCES, np.int64).T
        num_blocks = -(-context_lens // shape.block_size)
        tables = np.zeros((len(SEQUENCES), int(num_blocks.max())), np.int32)
        ids = rng.permutation(int(num_blocks.sum())) + 1
        for table, first, count in zip(tables, np.cumsum(num_blocks) - num_blocks, num_blocks, strict=True):
            table[:count] = ids[first : first + count]
        tables[-1, : SHARED_TOKENS // shape.block_size] = tables[2, : SHARED_TOKENS // shape.block_size]

        def slots_of(table: NDArray[np.int32], start: int, end: int) -> NDArray[np.int64]:
            positions = np.arange(start, end)
            return table[positions // shape.block_size] * shape.block_size + positions % shape.block_size

        slots = [slots_of(table, c - q, c) for table, (c, q) in zip(tables, SEQUENCES, strict=True)]
        written = [0] * (len(SEQUENCES) - 1) + [SHARED_TOKENS]
        old_slots = [slots_of(t, start, c - q) for t, start, (c, q) in zip(tables, written, SEQUENCES, strict=True)]
        self._shape = shape
        self._metadata = AttentionMetadata(
            block_tables=torch.from_numpy(tables).to(device),
            context_lens=torch.from_numpy(context_lens.astype(np.int32)).to(device),
            cu_seqlens_q=torch.from_numpy(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)).to(device),
            slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
            host_block_tables=tables,
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

        def random(*size: int) -> torch.Tensor:
            values = rng.standard_normal(size, dtype=np.float32)
            return torch.from_numpy(values).to(device=device, dtype=shape.dtype)

        self._num_blocks = len(ids) + 2  # the null block, and the copy's destination
        # What was written before the step: slots, and the keys and values of each.
        self._old_slots = torch.from_numpy(np.concatenate(old_slots)).to(device)
        old_shape = (len(self._old_slots), shape.num_kv_heads, shape.head_dim)
        self._old_keys, self._old_values = random(*old_shape), random(*old_shape)
        num_tokens = int(query_lens.sum())
        self._heads = random(num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        angles = random(num_tokens, 1, shape.head_dim // 2)
        self._angles = Angles(angles.cos(), angles.sin())
        self._head_norms = HeadNorms(random(shape.head_dim), random(shape.head_dim), EPSILON)
        num_inputs, num_outputs = MATRIX
        self._weight, self._bias = random(num_outputs, num_inputs) / num_inputs**0.5, random(num_outputs)
        self._gate_up, self._gate_up_bias = self._weight.repeat(2, 1), random(2 * num_outputs)
        self._norm = Norm(random(num_inputs), EPSILON)
        self._draws = Draws(
            rows=np.arange(num_outputs),
            temperatures=np.full(num_outputs, 0.7, np.float32),
            top_k=np.full(num_outputs, num_inputs // 2),
            top_p=np.full(num_outputs, 0.9, np.float32),
            min_p=np.full(num_outputs, 0.01, np.float32),
            uniforms=rng.random(num_outputs),
        )
        self._rows, self._total = random(num_tokens, num_inputs), random(num_tokens, num_outputs)

    def run(self, kernels: Kernels, sliding_window: int) -> torch.Tensor:
        """All operations: outputs, and the copied block, in one float32 vector."""
        pool = self._pool(kernels.kv_format)
        layer = LayerKV(pool[0], pool[1])
        step = kernels.prepare(self._metadata)
        query = step.rotate_and_write(self._heads.clone(), self._angles, self._head_norms, layer)
        attended = step.attend(query, layer, sliding_window)
        source, last = int(self._metadata.block_tables[2, 0]), pool.shape[1] - 1
        kernels.copy_blocks(pool[None], [BlockCopy(source, last, self._shape.block_size)])
        copied = (kernels.kv_format.read_keys(pool[0, last]), kernels.kv_format.read_values(pool[1, last]))
        logits = self._weight.float()
        choices = [kernels.greedy(logits), kernels.sample(logits, self._draws)]
        outputs = [attended, *copied, *self._multiply(kernels), *choices]
        return torch.cat([output.float().flatten() for output in outputs])

    def _pool(self, kv_format: KVFormat) -> torch.Tensor:
        """NaN in every slot that nobody wrote: [2, num_blocks, num_kv_heads, head_bytes]."""
        shape = (2, self._num_blocks, kv_format.num_kv_heads, kv_format.head_bytes)
        pool = torch.full(shape, NAN_BYTE, dtype=torch.uint8, device=self._old_slots.device)
        places = kv_format.places(self._old_slots)
        kv_format.write_keys(pool[0], places, self._old_keys)
        kv_format.write_values(pool[1], places, self._old_values)
        return pool

    def _multiply(self, kernels: Kernels) -> list[torch.Tensor]:
        linear, gated = kernels.linear(self._weight, self._bias), kernels.gated(self._gate_up, self._gate_up_bias)
        rows, norm, added = self._rows, self._norm, self._total.clone()
        linear.add(rows, added)
        return [linear.of_normed(rows, norm), linear.logits(rows, norm), added, gated.of_normed(rows, norm)]
