"""The specification, in plain PyTorch, for any device and dtype; attention's sums are float32.

Rows with as many queries and (rounded up) as many blocks are gathered and computed together. How a row is cut and
padded depends on its own lengths alone, never on its neighbours. Slots past a sequence's length may hold NaN: scores
are replaced there and values set to 0 before they are multiplied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kernels import Angles, AttentionMetadata, AttentionShape, BlockCopy, Draws, HeadNorms, LayerKV, Norm
from kernels.kv_format import KVFormat
from kernels.layers import UnfusedStep
from kernels.sampling import sample

# Queries of one row that are computed at once: bounds the scores of a long prompt.
MAX_QUERIES = 256
# Elements of gathered keys (and of values) at once: bounds the memory of a step at 2 x 64 MiB in float32.
MAX_GATHERED = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces of rows with as many queries and as many (rounded up) blocks.

    token_rows: [num_pieces * num_queries] int64, rows of the query.
    block_rows: [num_pieces * num_kv_heads * num_blocks] int64, rows of a layer's keys seen as [blocks * heads, ...].
    unwritten_rows: [any] int64, rows of the gathered values seen as [pieces * heads * slots, ...] that hold nothing.
    distances: [num_pieces, 1, 1, num_queries, num_blocks * block_size] int64, position of query minus that of key.
    """

    token_rows: torch.Tensor
    block_rows: torch.Tensor
    unwritten_rows: torch.Tensor
    distances: torch.Tensor
    num_queries: int

    def hidden(self, sliding_window: int) -> torch.Tensor:
        """Whether a query must not see a key; the shape of `distances`."""
        hidden = self.distances < 0
        return hidden | (self.distances >= sliding_window) if sliding_window else hidden


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Query ranges on the host: of which sequence, its first row of the query, its queries, KV tokens up to its end."""

    seqs: NDArray[np.int64]
    first_rows: NDArray[np.int64]
    query_lens: NDArray[np.int64]
    context_lens: NDArray[np.int64]


class ReferenceKernels:
    """See `kernels.Kernels`."""

    def __init__(self, device: torch.device, shape: AttentionShape, kv_format: KVFormat | None = None) -> None:
        """kv_format: another implementation's, to compare pools with it; by default a token's key lies together."""
        self._device = device
        self._shape = shape
        self._format = kv_format or KVFormat(
            shape.kv_dtype, shape.num_kv_heads, shape.head_dim, shape.block_size, key_group=shape.head_dim
        )

    @property
    def kv_format(self) -> KVFormat:
        """See `kernels.Kernels`."""
        return self._format

    def prepare(self, metadata: AttentionMetadata) -> "ReferenceStep":
        """Work lists for a step."""
        pieces = _cut(metadata)
        buckets = _round_up(-(-pieces.context_lens // self._shape.block_size))
        keys = pieces.query_lens * (int(buckets.max()) + 1) + buckets
        groups = []
        for key in np.unique(keys):
            members = np.flatnonzero(keys == key)
            num_blocks = int(buckets[members[0]])
            gathered = self._shape.num_kv_heads * num_blocks * self._shape.block_size * self._shape.head_dim
            at_once = max(1, MAX_GATHERED // gathered)
            for start in range(0, len(members), at_once):
                some = members[start : start + at_once]
                groups.append(self._group(metadata.block_tables, pieces, some, num_blocks))
        return ReferenceStep(self._shape, self._format, tuple(groups), metadata.slot_mapping)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "ReferenceLinear":
        """See `kernels.Kernels.linear`."""
        return ReferenceLinear(weight, bias)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "ReferenceGatedLinear":
        """See `kernels.Kernels.gated`."""
        return ReferenceGatedLinear(ReferenceLinear(weight, bias))

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """See `kernels.Kernels.greedy`."""
        return greedy(logits)

    def sample(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """See `kernels.Kernels.sample`."""
        return sample(logits, draws)

    def copy_blocks(self, pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        """See `kernels.Kernels.copy_blocks`."""
        for copy in copies:
            for plane in self._format.slots(pool, 0, copy.num_tokens):
                plane[..., copy.dst_block_id, :, :, :, :] = plane[..., copy.src_block_id, :, :, :, :]

    def _group(self, block_tables: torch.Tensor, pieces: _Pieces, members: NDArray[np.int64], num_blocks: int) -> Group:
        device = self._device
        num_queries = int(pieces.query_lens[members[0]])
        tables = torch.zeros((len(members), num_blocks), dtype=torch.int64, device=device)
        width = min(num_blocks, block_tables.shape[1])
        tables[:, :width] = block_tables[torch.from_numpy(pieces.seqs[members]).to(device), :width]
        heads = torch.arange(self._shape.num_kv_heads, device=device)[None, :, None]
        token_rows = pieces.first_rows[members][:, None] + np.arange(num_queries)
        context_lens = torch.from_numpy(pieces.context_lens[members]).to(device)
        key_positions = torch.arange(num_blocks * self._shape.block_size, device=device)
        query_positions = context_lens[:, None] - num_queries + torch.arange(num_queries, device=device)
        return Group(
            token_rows=torch.from_numpy(token_rows.reshape(-1)).to(device),
            block_rows=(tables[:, None, :] * self._shape.num_kv_heads + heads).reshape(-1),
            unwritten_rows=torch.from_numpy(self._unwritten_rows(pieces.context_lens[members], num_blocks)).to(device),
            distances=(query_positions[:, :, None] - key_positions)[:, None, None],
            num_queries=num_queries,
        )

    def _unwritten_rows(self, context_lens: NDArray[np.int64], num_blocks: int) -> NDArray[np.int64]:
        num_slots = num_blocks * self._shape.block_size
        is_unwritten = np.arange(num_slots) >= context_lens[:, None, None]
        return np.flatnonzero(np.repeat(is_unwritten, self._shape.num_kv_heads, axis=1))


class ReferenceStep(UnfusedStep):
    """See `kernels.AttentionStep`."""

    def __init__(
        self, shape: AttentionShape, kv_format: KVFormat, groups: tuple[Group, ...], slot_mapping: torch.Tensor
    ) -> None:
        self._shape = shape
        self._format = kv_format
        self._groups = groups
        self._places = kv_format.places(slot_mapping)
        self._hidden: dict[tuple[int, int], torch.Tensor] = {}

    def rotate_and_write(
        self, heads: torch.Tensor, angles: Angles, norms: HeadNorms | None, layer: LayerKV
    ) -> torch.Tensor:
        """See `kernels.AttentionStep.rotate_and_write`."""
        head_dim, num_heads, num_kv_heads = self._shape.head_dim, self._shape.num_heads, self._shape.num_kv_heads
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query = F.rms_norm(query, (head_dim,), norms.query, norms.epsilon)
            key = F.rms_norm(key, (head_dim,), norms.key, norms.epsilon)
        query, key = _rotate(query, angles), _rotate(key, angles)
        self._format.write_keys(layer.keys, self._places, key)
        self._format.write_values(layer.values, self._places, value)
        return query

    def attend(self, query: torch.Tensor, layer: LayerKV, sliding_window: int) -> torch.Tensor:
        """See `kernels.AttentionStep.attend`."""
        out = torch.empty_like(query)
        scaled = query.float() * self._shape.scale
        for i, group in enumerate(self._groups):
            if (i, sliding_window) not in self._hidden:
                self._hidden[i, sliding_window] = group.hidden(sliding_window)
            rows = self._attend_group(scaled[group.token_rows], layer, group, self._hidden[i, sliding_window])
            out.index_copy_(0, group.token_rows, rows.to(out.dtype))
        return out

    def _attend_group(self, scaled: torch.Tensor, layer: LayerKV, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of scaled queries [pieces * num_queries, num_heads, head_dim] float32; the same shape."""
        shape, num_queries = self._shape, group.num_queries
        num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
        group_size = shape.num_heads // num_kv_heads
        num_pieces = scaled.shape[0] // num_queries
        batch = num_pieces * num_kv_heads

        keys = self._format.read_keys(_gather(layer.keys, group)).view(batch, -1, head_dim)
        values = self._format.read_values(_gather(layer.values, group))
        values.view(-1, head_dim).index_fill_(0, group.unwritten_rows, 0.0)
        queries = scaled.view(num_pieces, num_queries, num_kv_heads, group_size, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(batch, group_size * num_queries, head_dim)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if shape.soft_cap:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        scores = scores.view(num_pieces, num_kv_heads, group_size, num_queries, -1)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        sums = torch.bmm(weights.view(batch, group_size * num_queries, -1), values.view(batch, -1, head_dim))
        sums = sums.view(num_pieces, num_kv_heads, group_size, num_queries, head_dim)
        return sums.permute(0, 3, 1, 2, 4).reshape(scaled.shape)


class ReferenceLinear:
    """See `kernels.Linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.of_normed`."""
        return self._multiply(F.rms_norm(x, (x.shape[-1],), norm.weight, norm.epsilon))

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.Linear.logits`."""
        return self.of_normed(x, norm).float()

    def add(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """See `kernels.Linear.add`."""
        total += self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


class ReferenceGatedLinear:
    """See `kernels.GatedLinear`."""

    def __init__(self, gate_up: ReferenceLinear) -> None:
        self._gate_up = gate_up

    def of_normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `kernels.GatedLinear.of_normed`."""
        gate, up = self._gate_up.of_normed(x, norm).chunk(2, dim=-1)
        return F.silu(gate) * up


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See `kernels.Kernels.greedy`."""
    return torch.stack((logits.argmax(dim=-1), logits.sum(dim=-1).isfinite().long()))


def _gather(plane: torch.Tensor, group: Group) -> torch.Tensor:
    """A copy of the group's blocks: [pieces * num_kv_heads * num_blocks, head_bytes]."""
    return plane.view(-1, plane.shape[-1]).index_select(0, group.block_rows)


def _rotate(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin), dim=-1)


def _cut(metadata: AttentionMetadata) -> _Pieces:
    """Each sequence's queries in pieces of at most MAX_QUERIES."""
    query_lens, context_lens = metadata.host_query_lens, metadata.host_context_lens
    num_pieces = -(-query_lens // MAX_QUERIES)
    seqs = np.repeat(np.arange(len(query_lens)), num_pieces)
    offsets = (np.arange(len(seqs)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * MAX_QUERIES
    piece_lens = np.minimum(MAX_QUERIES, query_lens[seqs] - offsets)
    first_rows = (np.cumsum(query_lens) - query_lens)[seqs] + offsets
    return _Pieces(seqs, first_rows, piece_lens, context_lens[seqs] - query_lens[seqs] + offsets + piece_lens)


def _round_up(num_blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: few groups, at most a third of padding."""
    power = 2 ** np.ceil(np.log2(num_blocks)).astype(np.int64)
    return np.where(num_blocks <= power * 3 // 4, power * 3 // 4, power)
