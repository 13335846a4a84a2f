"""What `kernels.cuda.bench` measures: cases, and their KV in as many layers as are far more than the caches hold."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import AttentionMetadata, AttentionShape, LayerKV
from kernels.cuda.attention import CudaKernels
from kernels.cuda.peers import flashinfer_candidates
from kernels.reference import ReferenceKernels

BLOCK_SIZE = 16
# Blocks of random numbers; a pool repeats them.
RANDOM_BLOCKS = 512
# The most by which a result may differ from the reference's: rounding to bfloat16, KV and weights of 8 bits.
TOLERANCE = 2e-2
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences by their KV tokens, the last query_len of which are queries.

    prefix_len: tokens at the front whose blocks all sequences share.
    """

    name: str
    context_lens: tuple[int, ...]
    group_size: int = 4
    num_kv_heads: int = 8
    head_dim: int = 128
    query_len: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    prefix_len: int = 0

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            *(self.group_size * self.num_kv_heads, self.num_kv_heads, self.head_dim, BLOCK_SIZE, self.head_dim**-0.5),
            *(self.dtype, self.kv_dtype or self.dtype),
        )

    @property
    def flop(self) -> int:
        """Of a layer: two products with every key that a query sees."""
        hidden = self.query_len * (self.query_len - 1) // 2
        pairs = sum(length * self.query_len - hidden for length in self.context_lens)
        return 4 * pairs * self.shape.num_heads * self.head_dim


class Layers:
    """A case's KV in as many layers as take about `num_bytes`, in shuffled blocks or ordered ones."""

    def __init__(self, case: Case, kernels: CudaKernels, num_bytes: int, is_shuffled: bool = True) -> None:
        self.case, self.kernels = case, kernels
        device, kv_format = kernels.device, kernels.kv_format
        rng = np.random.default_rng(0)
        lens = np.array(case.context_lens, np.int64)
        num_own = -(-lens // BLOCK_SIZE)
        num_blocks = int(num_own.sum())
        ids = rng.permutation(num_blocks) if is_shuffled else np.arange(num_blocks)
        self.tables = np.zeros((len(lens), int(num_own.max())), np.int32)
        for row, own in zip(self.tables, np.split(ids, np.cumsum(num_own)[:-1]), strict=True):
            row[: len(own)] = own
        self.tables[:, : case.prefix_len // BLOCK_SIZE] = self.tables[0, : case.prefix_len // BLOCK_SIZE]
        self.kv_bytes = num_blocks * 2 * case.num_kv_heads * kv_format.head_bytes  # of a layer
        self.num_layers = max(1, round(num_bytes / self.kv_bytes))
        random = torch.randn(RANDOM_BLOCKS, case.num_kv_heads, BLOCK_SIZE, case.head_dim, device=device)
        blocks = torch.zeros(*random.shape[:2], kv_format.head_bytes, dtype=torch.uint8, device=device)
        kv_format.write_keys(blocks, (), random.to(case.dtype))  # as values are written, too
        repeated = torch.arange(self.num_layers * 2 * num_blocks, device=device) % RANDOM_BLOCKS
        pool = blocks[repeated].view(self.num_layers, 2, num_blocks, *blocks.shape[1:])
        self.layers = [LayerKV(keys, values) for keys, values in pool]
        num_tokens = len(lens) * case.query_len
        self.query = torch.randn(num_tokens, case.shape.num_heads, case.head_dim, device=device).to(case.dtype)
        self.metadata = AttentionMetadata(
            block_tables=torch.from_numpy(self.tables).to(device),
            context_lens=torch.from_numpy(lens.astype(np.int32)).to(device),
            cu_seqlens_q=torch.arange(0, num_tokens + 1, case.query_len, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(0, dtype=torch.int64, device=device),  # nothing is written
            host_block_tables=self.tables,
            host_context_lens=lens,
            host_query_lens=np.full(len(lens), case.query_len, np.int64),
        )

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """What the last layer makes, as the reference finds it."""
        reference = ReferenceKernels(self.kernels.device, self.case.shape, self.kernels.kv_format)
        return reference.prepare(self.metadata).attend(self.query, self.layers[-1], 0)

    def check(self, name: str, run: Run) -> Run:
        """`run`, which makes what the last layer makes. Raises ArithmeticError where that is wrong."""
        found, expected = run().double().reshape(self.expected.shape), self.expected.double()
        error = float((found - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise ArithmeticError(f"{name} is off by {error:.1e} in {self.case.name}")
        return run

    def usable(self, peers: dict[str, Run]) -> dict[str, Run]:
        """Those of `peers` that run here, and are right; the others are named on stderr."""
        found = {}
        for name, run in peers.items():
            try:
                found[name] = self.check(name, run)
            except (ArithmeticError, RuntimeError) as error:
                sys.stderr.write(f"without {name}: {error}\n")
        return found

    def attend(self) -> Run:
        """By our kernels."""
        step = self.kernels.prepare(self.metadata)
        return self.check("pagoda", lambda: [step.attend(self.query, layer, 0) for layer in self.layers][-1])

    def peers(self) -> dict[str, Run]:
        """The same by FlashInfer, each way that it has."""
        planes = [(self._plain(layer.keys), self._plain(layer.values)) for layer in self.layers]
        try:
            found = flashinfer_candidates(self.case.shape, self.metadata, self.query, planes)
        except Exception as error:  # its import looks for compilers and drivers, its plans compile
            sys.stderr.write(f"without flashinfer: {error!r}\n")
            return {}
        return self.usable(found)

    def torch_prefills(self) -> dict[str, Run]:
        """The same by torch, over KV that lies as it wants: of equal lengths, contiguous, heads repeated."""
        case, index = self.case, torch.from_numpy(self.tables).to(self.query.device, torch.int64)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(len(case.context_lens), -1, case.shape.num_heads, case.head_dim).transpose(1, 2).contiguous()

        def gathered(plane: torch.Tensor) -> torch.Tensor:
            tokens = self._plain(plane)[index].transpose(2, 3)
            return heads(tokens.repeat_interleave(case.group_size, dim=3))

        query = heads(self.query)
        contiguous = [(gathered(layer.keys), gathered(layer.values)) for layer in self.layers]

        def attend(backend: SDPBackend) -> torch.Tensor:
            with sdpa_kernel(backend):
                outputs = [F.scaled_dot_product_attention(query, *kv, is_causal=True) for kv in contiguous]
            return outputs[-1].transpose(1, 2)

        backends = {"torch FlashAttention": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
        if self.query.device.type == "cpu":
            backends = {"torch": SDPBackend.MATH}
        return self.usable({name: functools.partial(attend, backend) for name, backend in backends.items()})

    def _plain(self, plane: torch.Tensor) -> torch.Tensor:
        """[num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], in place."""
        return plane.view(self.case.dtype).view(*plane.shape[:2], BLOCK_SIZE, self.case.head_dim)
