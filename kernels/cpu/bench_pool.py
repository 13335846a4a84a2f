"""What `kernels.cpu.bench` measures: cases, a layer's KV for one, and how torch attends to it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from kernels import AttentionMetadata, AttentionShape, LayerKV
from kernels.cpu import CpuKernels
from kernels.cpu.memory import empty_on_huge_pages

BLOCK_SIZE = 16
Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """num_seqs sequences of context_len KV tokens, the last query_len of them queries."""

    dtype: torch.dtype
    num_seqs: int
    context_len: int
    query_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        dtype = str(self.kv_dtype or self.dtype).removeprefix("torch.")
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        return f"{dtype:8} {heads:20} {self.num_seqs} x {self.context_len}"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            *(self.num_heads, self.num_kv_heads, self.head_dim, BLOCK_SIZE, self.head_dim**-0.5),
            *(self.dtype, self.kv_dtype or self.dtype),
        )


class Pool:
    """A layer's KV of random numbers, and a step that reads it through a block table."""

    def __init__(self, case: Case, shuffled: bool = True) -> None:
        self.case = case
        self.kernels = CpuKernels(case.shape)
        num_blocks = case.num_seqs * -(-case.context_len // BLOCK_SIZE)
        ids = torch.randperm(num_blocks) if shuffled else torch.arange(num_blocks)
        self.tables = ids.view(case.num_seqs, -1).to(torch.int32)
        self.query = torch.randn(case.num_seqs * case.query_len, case.num_heads, case.head_dim).to(case.dtype)
        kv_format = self.kernels.kv_format
        self.blocks = empty_on_huge_pages((2, num_blocks, case.num_kv_heads, kv_format.head_bytes), torch.uint8)
        self.layer = LayerKV(self.blocks[0], self.blocks[1])
        for plane, write in ((self.layer.keys, kv_format.write_keys), (self.layer.values, kv_format.write_values)):
            for block in plane:
                write(block, (), torch.randn(case.num_kv_heads, BLOCK_SIZE, case.head_dim))

    @functools.cached_property
    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the order that torch reads: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] of the dtype."""
        kv_format, dtype = self.kernels.kv_format, self.case.dtype
        return kv_format.read_keys(self.layer.keys).to(dtype), kv_format.read_values(self.layer.values).to(dtype)

    def metadata(self) -> AttentionMetadata:
        """The slot mapping is not used: nothing is written."""
        case = self.case
        context_lens = np.full(case.num_seqs, case.context_len, np.int64)
        query_lens = np.full(case.num_seqs, case.query_len, np.int64)
        return AttentionMetadata(
            block_tables=self.tables,
            context_lens=torch.from_numpy(context_lens.astype(np.int32)),
            cu_seqlens_q=torch.arange(0, case.num_seqs * case.query_len + 1, case.query_len, dtype=torch.int32),
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            host_block_tables=self.tables.numpy(),
            host_context_lens=context_lens,
            host_query_lens=query_lens,
        )

    def attend(self) -> Callable[[], torch.Tensor]:
        step = self.kernels.prepare(self.metadata())
        return lambda: step.attend(self.query, self.layer, 0)

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values made contiguous: [num_seqs, num_kv_heads, context_len, head_dim]."""
        case = self.case

        def gather(blocks: torch.Tensor) -> torch.Tensor:
            rows = blocks.index_select(0, self.tables.reshape(-1)).view(case.num_seqs, -1, *blocks.shape[1:])
            return rows.transpose(1, 2).reshape(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

        keys, values = self.plain
        return gather(keys), gather(values)


def torch_decodes(pool: Pool) -> Candidates:
    """Gather, then attend in each of the ways that torch offers; a group's heads are seen as query tokens, for
    enable_gqa is several times slower."""
    case = pool.case
    query = pool.query.view(case.num_seqs, case.num_kv_heads, -1, case.head_dim)

    def with_sdpa() -> torch.Tensor:
        keys, values = pool.gathered()
        return F.scaled_dot_product_attention(query, keys, values)

    def with_matmul() -> torch.Tensor:
        keys, values = pool.gathered()
        return (query @ keys.transpose(-1, -2) * case.shape.scale).softmax(dim=-1) @ values

    return {"torch gather + SDPA": with_sdpa, "torch gather + matmul": with_matmul}


def torch_prefills(pool: Pool) -> Candidates:
    """SDPA over KV that is contiguous already."""
    case = pool.case
    keys, values = pool.gathered()
    group_size = case.num_heads // case.num_kv_heads
    repeated_keys, repeated_values = (x.repeat_interleave(group_size, dim=1) for x in (keys, values))
    query = pool.query.view(case.num_seqs, case.query_len, case.num_heads, case.head_dim).transpose(1, 2)
    return {
        "torch SDPA, heads repeated": lambda: F.scaled_dot_product_attention(
            query, repeated_keys, repeated_values, is_causal=True
        ),
        "torch SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        ),
    }
