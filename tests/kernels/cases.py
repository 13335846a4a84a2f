"""Steps of paged attention to compute: random shapes, lengths and tables, in a pool full of NaN; and their results."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kernels import Angles, AttentionMetadata, AttentionShape, AttentionStep, HeadNorms, Kernels, LayerKV
from kernels.kv_format import NAN_BYTE, KVFormat
from kernels.reference import ReferenceKernels


@dataclass(frozen=True)
class Case:
    """One step: per sequence, KV tokens before it and query tokens in it."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    sliding_window: int
    lens: list[tuple[int, int]]
    seed: int
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    soft_cap: float = 0.0

    @property
    def shape(self) -> AttentionShape:
        num_heads, kv_dtype = self.num_kv_heads * self.group_size, self.kv_dtype or self.dtype
        sizes = num_heads, self.num_kv_heads, self.head_dim, self.block_size
        return AttentionShape(*sizes, self.head_dim**-0.5, self.dtype, kv_dtype, self.soft_cap)


cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 8),
    head_dim=st.sampled_from([2, 8, 16, 64]),
    block_size=st.sampled_from([16, 32]),
    sliding_window=st.sampled_from([0, 0, 1, 5, 16, 40]),
    lens=st.lists(st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 50))), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)


class Step:
    """Sequences in blocks of random order; `layer` is the pool of the last run, or None."""

    def __init__(self, case: Case) -> None:
        rng = torch.Generator().manual_seed(case.seed)
        self.case = case
        block_counts = [-(-(before + new) // case.block_size) for before, new in case.lens]
        self.num_blocks = sum(block_counts) + 1
        order = (torch.randperm(self.num_blocks - 1, generator=rng) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in block_counts]
        self.keys, self.values, self.queries = [], [], []
        for before, new in case.lens:

            def random(num_tokens: int, num_heads: int) -> torch.Tensor:
                return torch.randn(num_tokens, num_heads, case.head_dim, generator=rng).to(case.dtype)

            self.keys.append(random(before + new, case.num_kv_heads))
            self.values.append(random(before + new, case.num_kv_heads))
            self.queries.append(random(new, case.shape.num_heads))

    def lay_out(self, kv_format: KVFormat, device: str = "cpu") -> LayerKV:
        """A pool of NaN in which only what came before the step is written."""
        shape = (2, self.num_blocks, kv_format.num_kv_heads, kv_format.head_bytes)
        pool = torch.full(shape, NAN_BYTE, dtype=torch.uint8, device=device)
        for (before, _), table, keys, values in zip(self.case.lens, self.tables, self.keys, self.values, strict=True):
            places = kv_format.places(torch.tensor(self._slots(table, 0, before), dtype=torch.int64, device=device))
            kv_format.write_keys(pool[0], places, keys[:before].to(device))
            kv_format.write_values(pool[1], places, values[:before].to(device))
        return LayerKV(pool[0], pool[1])

    def metadata(self, device: str = "cpu") -> AttentionMetadata:
        case = self.case
        query_lens = np.array([new for _, new in case.lens], np.int64)
        context_lens = np.array([before + new for before, new in case.lens], np.int64)
        width = max(map(len, self.tables))
        slots = [
            slot
            for (before, new), table in zip(case.lens, self.tables, strict=True)
            for slot in self._slots(table, before, before + new)
        ]

        def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        tables = [table + [0] * (width - len(table)) for table in self.tables]
        return AttentionMetadata(
            block_tables=tensor(tables, torch.int32),
            context_lens=tensor(context_lens.tolist(), torch.int32),
            cu_seqlens_q=tensor([0, *np.cumsum(query_lens).tolist()], torch.int32),
            slot_mapping=tensor(slots, torch.int64),
            host_block_tables=np.array(tables, np.int32),
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

    def run(self, kernels_: Kernels, device: str = "cpu") -> torch.Tensor:
        """Write the step's keys and values, then attend: [num_tokens, num_heads, head_dim]."""
        layer = self.lay_out(kernels_.kv_format, device)
        step = kernels_.prepare(self.metadata(device))
        query = write_plain(step, self.heads().to(device), layer)
        self.layer = layer
        return step.attend(query, layer, self.case.sliding_window).cpu()

    def heads(self) -> torch.Tensor:
        """The step's queries, keys and values, as a layer's projection has them."""
        new = [count for _, count in self.case.lens]
        keys, values = (
            torch.cat([row[-n:] for row, n in zip(rows, new, strict=True)]) for rows in (self.keys, self.values)
        )
        return torch.cat((torch.cat(self.queries), keys, values), dim=1)

    def dense(self) -> torch.Tensor:
        """The same by definition, in float64, over keys and values as the pool holds them."""
        kv_format = ReferenceKernels(torch.device("cpu"), self.case.shape).kv_format
        keys, values = ([as_held(kv_format, x) for x in rows] for rows in (self.keys, self.values))
        return torch.cat([dense(q, k, v, self.case) for q, k, v in zip(self.queries, keys, values, strict=True)])

    def _slots(self, table: list[int], start: int, end: int) -> list[int]:
        size = self.case.block_size
        return [table[position // size] * size + position % size for position in range(start, end)]


def as_held(kv_format: KVFormat, rows: torch.Tensor) -> torch.Tensor:
    """What a pool holds of `rows`, [..., head_dim], in float64."""
    elements, scales = kv_format.quantize(rows)
    return elements.double() if scales is None else elements.double() * scales[..., None]


def turned(
    heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values after norms and rotation, by definition, in float64."""
    query, key, value = torch.split(heads.double(), [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    if norms is not None:
        query = F.rms_norm(query, (shape.head_dim,), norms.query.double(), norms.epsilon)
        key = F.rms_norm(key, (shape.head_dim,), norms.key.double(), norms.epsilon)
    cos, sin = angles.cos.double(), angles.sin.double()

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turn(query), turn(key), value


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def write_plain(step: AttentionStep, heads: torch.Tensor, layer: LayerKV) -> torch.Tensor:
    """Writes keys and values as they are: every token's angle is 0. Returns the queries."""
    zeros = torch.zeros_like(heads[:, :1, : heads.shape[2] // 2])
    return step.rotate_and_write(heads, Angles(zeros.cos(), zeros), None, layer)


def dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, case: Case) -> torch.Tensor:
    """One sequence: query [new, num_heads, head_dim], keys and values [context, num_kv_heads, head_dim]."""
    new, context = query.shape[0], keys.shape[0]
    distances = torch.arange(context - new, context)[:, None] - torch.arange(context)
    hidden = (distances < 0) | ((distances >= case.sliding_window) if case.sliding_window else distances < 0)
    keys, values = (x.double().repeat_interleave(case.group_size, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * case.shape.scale
    if case.soft_cap:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), values)
