"""Paged attention, and the matrix products around it, behind one small face.

Owns the arithmetic over KV blocks (writing keys and values by slot, attending through block tables, copying blocks)
and over weights. Knows nothing of requests, sequences or plans. `reference` is the specification; `select_kernels` is
the one place where native kernels attach.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.kv_format import KVFormat

log = logging.getLogger("pagoda.kernels")


class KernelError(Exception):
    """Native kernels could not be launched; the message is the driver's, or the emulation's."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What every layer of a model has in common.

    `scale`, positive, multiplies the scores; `block_size` is in tokens; `dtype` is that of weights and activations,
    `kv_dtype` that of the pool's elements: the same, or an 8-bit one. With a `soft_cap` scores become soft_cap *
    tanh(score / soft_cap) (Gemma Team, 2024: https://arxiv.org/abs/2408.00118); 0 leaves them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    soft_cap: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer of the KV pool, head-major.

    keys, values: [num_blocks, num_kv_heads, head_bytes] uint8, contiguous; what the bytes are is said by the kernels'
    `kv_format`. What a slot holds before it is written is undefined, NaN included.
    """

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Who attends to what in one step: `num_seqs` sequences, `num_tokens` query tokens one after the other.

    block_tables: [num_seqs, max_blocks] int32, on the device; entries past a sequence's own blocks are any valid id.
    context_lens: [num_seqs] int32, on the device: KV tokens, this step's included.
    cu_seqlens_q: [num_seqs + 1] int32, on the device: sequence i's queries are rows cu[i] to cu[i + 1]; each has one
        at least, and they are its last tokens.
    slot_mapping: [num_tokens] int64, on the device: block_id * block_size + offset of each query token.
    host_block_tables, host_context_lens, host_query_lens: int32, int64, int64, the same on the host, for work lists.
    """

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    slot_mapping: torch.Tensor
    host_block_tables: NDArray[np.int32]
    host_context_lens: NDArray[np.int64]
    host_query_lens: NDArray[np.int64]

    @property
    def max_context_len(self) -> int:
        """KV tokens of the longest sequence."""
        return int(self.host_context_lens.max())

    @property
    def max_query_len(self) -> int:
        """Query tokens of the sequence that runs most."""
        return int(self.host_query_lens.max())


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first `num_tokens` slots of a block, to be copied into another, in every layer."""

    src_block_id: int
    dst_block_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Angles:
    """Of each token's rotary embedding: cos, sin, [num_tokens, 1, head_dim / 2], contiguous, of the model's dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm. weight: [size of what is normed]."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Root mean square norms on heads. query, key: [head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class Linear(Protocol):
    """y = x W^T + b for rows x, with what comes before and after it in a layer; sums are float32.

    Rows are [num_tokens, in] and [num_tokens, out], contiguous, of the weight's dtype.
    """

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """y of the norm of x."""

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """y of the norm of x, in float32."""

    def add(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add y to `total`."""


class GatedLinear(Protocol):
    """SiLU(gate) * up, where gate and up are the two halves of a `Linear`'s y, gates first."""

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Of the norm of x: [num_tokens, out / 2]. Rows as in `Linear`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: pre-norm, rotary grouped-query attention, gated MLP; its matrices as `Kernels` made them.

    qkv makes query heads, key heads, value heads. sliding_window as in `AttentionStep.attend`.
    """

    input_norm: Norm
    qkv: Linear
    head_norms: HeadNorms | None
    o: Linear
    post_norm: Norm
    gate_up: GatedLinear
    down: Linear
    sliding_window: int


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model, but for its KV.

    embedding: [vocab_size, hidden_size]; cos, sin: [num_positions, 1, head_dim / 2], the angles of all positions; all
    contiguous, of the model's dtype. lm_head makes logits of the norm of hidden states.
    """

    embedding: torch.Tensor
    layers: Sequence[Layer]
    cos: torch.Tensor
    sin: torch.Tensor
    norm: Norm
    lm_head: Linear


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows of logits to sample from, one entry each, on the host.

    rows: [num_draws] int64. temperatures: float32, positive. top_k: int64, 0 for all. top_p, min_p: float32. uniforms:
    float64 in [0, 1), where in the distribution, ids in their order, the choice lies; for several steps [num_steps,
    num_draws].
    """

    rows: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    uniforms: NDArray[np.float64]


class AttentionStep(Protocol):
    """The work lists of one step, used by all its layers."""

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """Norm and turn queries and keys, write keys and values into the slots of slot_mapping; returns the queries.

        heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first, then keys, then values; what it
        holds afterwards is undefined. Dimension i is turned with i + head_dim / 2.
        """

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """Causal attention of query, [num_tokens, num_heads, head_dim], over the written slots; the same shape.

        A token at position p sees positions p - sliding_window + 1 to p; 0 is full attention. The step's own keys and
        values must have been written.
        """

    def run_layers(
        self,
        layers: Sequence[Layer],
        kv: Sequence[LayerKV],
        hidden: torch.Tensor,
        angles: Angles,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the last layer makes of `rows`, [num_rows] int64, or of all: [num_rows or num_tokens, hidden_size].

        hidden: [num_tokens, hidden_size], what the first layer is given, overwritten. Keys and values go into `kv`.
        From tokens that are not among `rows` the last layer needs nothing else.
        """

    def decode(
        self,
        model: Model,
        kv: Sequence[LayerKV],
        input_ids: NDArray[np.int64],
        steps_each: NDArray[np.int64],
        draws: Draws | None,
    ) -> NDArray[np.int64] | None:
        """This step, of one token per sequence, and those behind it, each of the tokens that the one before chose: at
        random for the sequences that `draws` has rows of, the likeliest for the others.

        input_ids: [num_seqs]; steps_each: [num_seqs], how many steps each sequence takes, in descending order. As many
        as are done: [done, 2, num_seqs] int64, as `Kernels.greedy` says; nothing finite follows what is not, and what
        stands behind a sequence's last step means nothing. Block tables must have the blocks for all. None where these
        kernels run one step at a time, or nothing is done.
        """


class Kernels(Protocol):
    """One implementation for one device, model shape and block size."""

    @property
    def kv_format(self) -> KVFormat:
        """How the pool's bytes are to be read."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """weight: [out, in], contiguous; bias: [out]. It may keep its own copy, in an order of its own."""

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> GatedLinear:
        """As `linear`, of gates over what they open."""

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """The lowest of the most likely token ids, and whether all logits are finite (1 or 0): [2, num_rows] int64.

        logits: [num_rows, vocab_size] float32. The id of a row that is not finite is any.
        """

    def sample(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Token ids at random: [num_draws] int64.

        Of the softmax at the row's temperature, the top_k likeliest stay, of these the likeliest up to a share of
        top_p, and what has min_p times the highest probability; equals at a border stay together. logits: [num_rows,
        vocab_size] float32. The id of a row that is not finite is any.
        """

    def prepare(self, metadata: AttentionMetadata) -> AttentionStep:
        """Work lists for a step, made once for all layers."""

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        """Run `copies` in order. pool: [num_layers, 2, num_blocks, num_kv_heads, head_bytes], keys before values."""


def select_kernels(device: torch.device, shape: AttentionShape) -> Kernels:
    """The kernels for `device`: native ones where they cover `shape` and can be built; the reference runs on any."""
    from kernels.reference import ReferenceKernels

    if device.type == "cpu":
        from kernels.build import BuildError
        from kernels.cpu import CpuKernels, UnsupportedShapeError

        try:
            return CpuKernels(shape)
        except (BuildError, UnsupportedShapeError) as error:
            log.warning("the reference kernels serve, many times slower: %s", error)
    if device.type == "cuda":
        from kernels.cuda.select import select_cuda_kernels

        return select_cuda_kernels(device, shape)
    return ReferenceKernels(device, shape)
