"""Attention steps for the CUDA kernels: random sequences in a hostile pool, and what the result should be in float64.

The pool holds NaN wherever nothing was written, tables name impossible blocks past a sequence's own, and every tensor
ends at an unreadable page.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from kernels import AttentionMetadata, AttentionShape, Kernels, LayerKV
from kernels.cuda.attention import Backend, CudaKernels, Tuning
from kernels.cuda.variant import Variant
from kernels.kv_format import NAN_BYTE, KVFormat
from tests.kernels.cases import as_held, write_plain
from tests.kernels.cuda.backends import EMULATION
from tests.kernels.guarded import guarded

NO_BLOCK = 2**30
SOFT_CAP = 2.0
# Small partitions, so that short sequences are split too; or one, so that its tiles go round the rings.
PARTITION_LEN = 32
LONG_PARTITION_LEN = 512
MAX_PARTITIONS = 4
# Enough for the partial results of any case.
SCRATCH_ROWS = 16 * 16 * MAX_PARTITIONS


def shape_of(variant: Variant, num_heads: int, num_kv_heads: int, scale: float) -> AttentionShape:
    kv_dtype, soft_cap = variant.kv_dtype or variant.dtype, SOFT_CAP if variant.has_soft_cap else 0.0
    sizes = num_heads, num_kv_heads, variant.head_dim, variant.block_size
    return AttentionShape(*sizes, scale, variant.dtype, kv_dtype, soft_cap)


@dataclass(frozen=True)
class Case:
    """One step: per sequence, KV tokens before it and query tokens in it; order_seed: of the emulation's threads.

    prefix_blocks: of each sequence, how many of its first blocks are the first sequence's at most; empty: none is.
    """

    variant: Variant
    num_kv_heads: int
    group_size: int
    sliding_window: int
    lens: list[tuple[int, int]]
    seed: int
    order_seed: int
    partition_len: int = PARTITION_LEN
    prefix_blocks: tuple[int, ...] = ()

    @property
    def shape(self) -> AttentionShape:
        head_dim = self.variant.head_dim
        num_heads = self.num_kv_heads * self.group_size
        return shape_of(self.variant, num_heads, self.num_kv_heads, head_dim**-0.5)

    @property
    def kv_format(self) -> KVFormat:
        return CudaKernels(torch.device("cpu"), self.shape, EMULATION, self.tuning).kv_format

    @property
    def tuning(self) -> Tuning:
        return Tuning(self.partition_len, MAX_PARTITIONS)


contexts = st.one_of(st.integers(0, 40), st.integers(0, 400))
queries = st.one_of(st.just(1), st.just(1), st.integers(1, 6), st.integers(1, 70))


def cases(variant: Variant) -> st.SearchStrategy[Case]:
    """Cases of one variant, of a size that the emulation runs in some ten milliseconds."""
    windows = st.sampled_from([1, 5, 16, 40, 100]) if variant.has_window else st.just(0)
    return st.builds(
        Case,
        variant=st.just(variant),
        num_kv_heads=st.integers(1, 3),
        group_size=st.integers(1, 16),
        sliding_window=windows,
        lens=st.lists(st.tuples(contexts, queries), min_size=1, max_size=4),
        seed=st.integers(0, 2**32 - 1),
        order_seed=st.integers(0, 2**32 - 1),
        partition_len=st.sampled_from([PARTITION_LEN, LONG_PARTITION_LEN]),
    )


def sharing_cases(variant: Variant) -> st.SearchStrategy[Case]:
    """Mostly decodes, some of which share blocks with the first sequence: few, or as many as both have."""
    lens = st.tuples(st.sampled_from([0, 31, 48, 97, 129, 200]), st.sampled_from([1, 1, 1, 1, 2, 40]))
    sequences = st.lists(st.tuples(lens, st.sampled_from([0, 2, 3, 99, 99])), min_size=2, max_size=9)
    return st.builds(
        lambda sequences, **fields: Case(
            lens=[(129, 1), *(lens for lens, _ in sequences)],
            prefix_blocks=(0, *(shared for _, shared in sequences)),
            **fields,
        ),
        variant=st.just(variant),
        num_kv_heads=st.integers(1, 2),
        group_size=st.sampled_from([1, 2, 3, 4, 7, 8, 9]),
        sliding_window=st.sampled_from([20, 100]) if variant.has_window else st.just(0),
        sequences=sequences,
        seed=st.integers(0, 2**32 - 1),
        order_seed=st.integers(0, 2**32 - 1),
        partition_len=st.sampled_from([PARTITION_LEN, PARTITION_LEN, LONG_PARTITION_LEN]),
    )


@dataclass(frozen=True)
class Machine:
    """Where kernels run that attend to nothing: what makes them, and copies a tensor there.

    kernels_for(variant, num_heads, num_kv_heads).
    """

    kernels_for: Callable[[Variant, int, int], CudaKernels]
    place: Callable[[torch.Tensor], torch.Tensor]


def kernels_for(backend: Backend, variant: Variant, num_heads: int, num_kv_heads: int) -> CudaKernels:
    """On this CPU, for tests that attend to nothing."""
    return CudaKernels(torch.device("cpu"), shape_of(variant, num_heads, num_kv_heads, 1.0), backend, Tuning())


def emulated(backend: Backend) -> Machine:
    """This CPU."""
    return Machine(functools.partial(kernels_for, backend), guarded)


def kernels_of(case: Case, backend: Backend) -> CudaKernels:
    """On this CPU. Their scratch holds NaN."""
    kernels = CudaKernels(torch.device("cpu"), case.shape, backend, case.tuning)
    kernels.scratch.reserve(SCRATCH_ROWS)
    kernels.scratch.sums.fill_(float("nan"))
    kernels.scratch.stats.fill_(float("nan"))
    return kernels


@dataclass(frozen=True)
class Sequence:
    """keys, values: [context, num_kv_heads, head_dim]; query: [new tokens, num_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor
    table: list[int]


class Step:
    """The sequences of a case, and a pool in which only what came before the step is written."""

    def __init__(self, case: Case, place: Callable[[torch.Tensor], torch.Tensor] = guarded) -> None:
        rng = torch.Generator().manual_seed(case.seed)
        self.case = case
        self._place = place
        block_size, num_kv_heads = case.variant.block_size, case.num_kv_heads
        block_counts = [-(-(before + new) // block_size) for before, new in case.lens]
        num_blocks = sum(block_counts) + 1
        order = (torch.randperm(num_blocks - 1, generator=rng) + 1).tolist()
        plane = torch.full((num_blocks, num_kv_heads, case.kv_format.head_bytes), NAN_BYTE, dtype=torch.uint8)
        self.layer = LayerKV(place(plane), place(plane))
        self.sequences: list[Sequence] = []
        prefix_blocks = case.prefix_blocks or (0,) * len(case.lens)
        for (before, new), count, most in zip(case.lens, block_counts, prefix_blocks, strict=True):

            def random(tokens: int, heads: int) -> torch.Tensor:
                tensor = torch.randn(tokens, heads, case.variant.head_dim, generator=rng)
                return tensor.to(case.variant.dtype)

            keys, values = (random(before + new, num_kv_heads) for _ in range(2))
            table = [order.pop() for _ in range(count)]
            if most:
                self._share_prefix(keys, values, table, min(most, before // block_size, case.lens[0][0] // block_size))
            self.sequences.append(Sequence(keys, values, random(new, case.shape.num_heads), table))
            fill(self.layer, case.kv_format, self.sequences[-1], before)

    def _share_prefix(self, keys: torch.Tensor, values: torch.Tensor, table: list[int], num_blocks: int) -> None:
        first, num_tokens = self.sequences[0], num_blocks * self.case.variant.block_size
        keys[:num_tokens], values[:num_tokens] = first.keys[:num_tokens], first.values[:num_tokens]
        table[:num_blocks] = first.table[:num_blocks]

    def alone(self, index: int) -> "Step":
        """The same sequence, with the same blocks, as the only one of its step."""
        step = Step(dataclasses.replace(self.case, lens=[self.case.lens[index]], prefix_blocks=()), self._place)
        step.layer = self.layer
        step.sequences = [self.sequences[index]]
        return step

    def metadata(self) -> AttentionMetadata:
        query_lens = np.array([new for _, new in self.case.lens], np.int64)
        context_lens = np.array([before + new for before, new in self.case.lens], np.int64)
        width = max(len(sequence.table) for sequence in self.sequences)
        rows = [sequence.table + [NO_BLOCK] * (width - len(sequence.table)) for sequence in self.sequences]
        slots = [
            slot(sequence.table, position, self.case.variant.block_size)
            for (before, new), sequence in zip(self.case.lens, self.sequences, strict=True)
            for position in range(before, before + new)
        ]
        return AttentionMetadata(
            block_tables=self._place(torch.tensor(rows, dtype=torch.int32)),
            context_lens=self._place(torch.from_numpy(context_lens).int()),
            cu_seqlens_q=self._place(torch.tensor([0, *np.cumsum(query_lens).tolist()], dtype=torch.int32)),
            slot_mapping=self._place(torch.tensor(slots, dtype=torch.int64)),
            host_block_tables=np.array(rows, np.int32),
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

    def run(self, kernels: Kernels) -> torch.Tensor:
        """Write the step's keys and values, then attend: [num_tokens, num_heads, head_dim]."""
        step = kernels.prepare(self.metadata())
        new = [sequence.query.shape[0] for sequence in self.sequences]
        key, value = (
            torch.cat([tensor[-n:] for n, tensor in zip(new, tensors, strict=True)])
            for tensors in ([s.keys for s in self.sequences], [s.values for s in self.sequences])
        )
        heads = torch.cat([torch.cat([sequence.query for sequence in self.sequences]), key, value], dim=1)
        query = write_plain(step, self._place(heads), self.layer)
        # Queries may be a part of a wider tensor.
        wider = self._place(torch.cat([key.to(query.device), query], dim=1))
        return step.attend(wider[:, key.shape[1] :], self.layer, self.case.sliding_window)

    def emulate(self, kernels: CudaKernels) -> torch.Tensor:
        """`run` on this CPU, with threads in the case's order."""
        kernels.library(self.case.variant.has_window).seed_emulation(self.case.order_seed)
        return self.run(kernels)

    def dense(self) -> torch.Tensor:
        """The same by definition, in float64."""
        return torch.cat([dense(sequence, self.case) for sequence in self.sequences])


def slot(table: list[int], position: int, block_size: int) -> int:
    """Where a sequence's token lies in the pool."""
    return table[position // block_size] * block_size + position % block_size


def fill(layer: LayerKV, kv_format: KVFormat, sequence: Sequence, num_tokens: int) -> None:
    """Write the first `num_tokens` keys and values of a sequence into its blocks."""
    device, block_size = layer.keys.device, kv_format.block_size
    slots = [slot(sequence.table, position, block_size) for position in range(num_tokens)]
    places = kv_format.places(torch.tensor(slots, dtype=torch.int64, device=device))
    kv_format.write_keys(layer.keys, places, sequence.keys[:num_tokens].to(device))
    kv_format.write_values(layer.values, places, sequence.values[:num_tokens].to(device))


def dense(sequence: Sequence, case: Case) -> torch.Tensor:
    """Attention of one sequence in float64, over what the pool holds of it: [new tokens, num_heads, head_dim]."""
    held = (as_held(case.kv_format, x) for x in (sequence.keys, sequence.values))
    keys, values = (x.repeat_interleave(case.group_size, 1) for x in held)
    scores = torch.einsum("qhd,khd->hqk", sequence.query.double(), keys) * case.shape.scale
    if case.variant.has_soft_cap:
        scores = SOFT_CAP * torch.tanh(scores / SOFT_CAP)
    context, new = keys.shape[0], sequence.query.shape[0]
    distances = torch.arange(context - new, context)[:, None] - torch.arange(context)
    hidden = distances < 0
    if case.sliding_window:
        hidden |= distances >= case.sliding_window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
