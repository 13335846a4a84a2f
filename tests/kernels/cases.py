"""Steps of paged attention to compute: random shapes, lengths and tables, in a pool full of NaN; and their results."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kernels import Angles, AttentionMetadata, AttentionShape, AttentionStep, HeadNorms, Kernels, LayerKV


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

    @property
    def shape(self) -> AttentionShape:
        num_heads = self.num_kv_heads * self.group_size
        return AttentionShape(num_heads, self.num_kv_heads, self.head_dim, self.block_size, self.head_dim**-0.5)


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
    """A pool of NaN in which only what came before the step is written, in blocks of random order."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        rng = torch.Generator().manual_seed(case.seed)
        self.case = case
        block_counts = [-(-(before + new) // case.block_size) for before, new in case.lens]
        num_blocks = sum(block_counts) + 1
        order = (torch.randperm(num_blocks - 1, generator=rng) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in block_counts]
        shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
        self.layer = LayerKV(*(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)))
        self.keys, self.values, self.queries = [], [], []
        for (before, new), table in zip(case.lens, self.tables, strict=True):
            num_heads = case.num_kv_heads * case.group_size
            self.keys.append(torch.randn(before + new, case.num_kv_heads, case.head_dim, generator=rng).to(dtype))
            self.values.append(torch.randn(before + new, case.num_kv_heads, case.head_dim, generator=rng).to(dtype))
            self.queries.append(torch.randn(new, num_heads, case.head_dim, generator=rng).to(dtype))
            for position in range(before):
                block, slot = table[position // case.block_size], position % case.block_size
                self.layer.keys[block, :, slot] = self.keys[-1][position].to(device)
                self.layer.values[block, :, slot] = self.values[-1][position].to(device)

    def metadata(self, device: str = "cpu") -> AttentionMetadata:
        case = self.case
        query_lens = np.array([new for _, new in case.lens], np.int64)
        context_lens = np.array([before + new for before, new in case.lens], np.int64)
        width = max(map(len, self.tables))
        slots = [
            table[position // case.block_size] * case.block_size + position % case.block_size
            for (before, new), table in zip(case.lens, self.tables, strict=True)
            for position in range(before, before + new)
        ]

        def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return AttentionMetadata(
            block_tables=tensor([table + [0] * (width - len(table)) for table in self.tables], torch.int32),
            context_lens=tensor(context_lens.tolist(), torch.int32),
            cu_seqlens_q=tensor([0, *np.cumsum(query_lens).tolist()], torch.int32),
            slot_mapping=tensor(slots, torch.int64),
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

    def run(self, kernels_: Kernels, device: str = "cpu") -> torch.Tensor:
        """Write the step's keys and values, then attend: [num_tokens, num_heads, head_dim]."""
        step = kernels_.prepare(self.metadata(device))
        query = write_plain(step, self.heads().to(device), self.layer)
        return step.attend(query, self.layer, self.case.sliding_window).cpu()

    def heads(self) -> torch.Tensor:
        """The step's queries, keys and values, as a layer's projection has them."""
        new = [count for _, count in self.case.lens]
        keys, values = (
            torch.cat([row[-n:] for row, n in zip(rows, new, strict=True)]) for rows in (self.keys, self.values)
        )
        return torch.cat((torch.cat(self.queries), keys, values), dim=1)

    def dense(self) -> torch.Tensor:
        """The same by definition, in float64."""
        return torch.cat(
            [dense(q, k, v, self.case) for q, k, v in zip(self.queries, self.keys, self.values, strict=True)]
        )


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
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), values)
