"""The specification of sampling, in plain PyTorch, for any device: see `kernels.Kernels.sample`.

top_k, top_p and min_p each become a lower bound on probability, so that no order among equals matters (equals at the
border stay in); then the inverse of the cumulative distribution, in order of ids, is taken at the row's number.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kernels import Draws
from kernels.upload import upload

# Highest probabilities that are sorted for top_k and top_p, before (seldom) a row is sorted in full.
FIRST_LOOK = 256
# Rows that are sorted in full at once: what that takes is no part of a worker's memory profile.
ROWS_SORTED = 32
# Ids whose probabilities are summed at once on the way to a choice.
CHUNK_SIZE = 256


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """See `kernels.Kernels.sample`."""
    is_all = len(draws.rows) == len(logits)  # then no row is copied
    some = logits if is_all else logits[upload(draws.rows, logits.device)]
    probabilities = (some / _column(draws.temperatures, logits)).softmax(dim=-1)
    limited = np.flatnonzero((draws.top_k > 0) | (draws.top_p < 1))
    if not len(limited) and not draws.min_p.any():
        return _choose(probabilities, draws.uniforms)
    bound = _column(draws.min_p, logits) * probabilities.amax(dim=-1, keepdim=True)
    if len(limited):
        on_device = upload(limited, logits.device)
        top_bound = _top_bound(probabilities[on_device], draws.top_k[limited], draws.top_p[limited])
        bound[on_device] = torch.maximum(bound[on_device], top_bound)
    return _choose(probabilities.masked_fill_(probabilities < bound, 0.0), draws.uniforms)


def _choose(kept: torch.Tensor, uniforms: NDArray[np.float64]) -> torch.Tensor:
    """The id at which the running sum of `kept` passes the row's random share of all: first the chunk, then the id.

    Sums are float64: no order of summation shows.
    """
    vocab_size = kept.shape[1]
    chunks = F.pad(kept, (0, -vocab_size % CHUNK_SIZE)).view(len(kept), -(-vocab_size // CHUNK_SIZE), CHUNK_SIZE)
    sums = chunks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = _column(uniforms, kept) * sums[:, -1:]
    chunk = torch.searchsorted(sums, targets, right=True).clamp_(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, chunk)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK_SIZE))[:, 0].double().cumsum(dim=-1)
    # A target between the sum of the chunks before and the first of this one is this chunk's first id with a share;
    # one that rounding puts behind its last belongs to that last id.
    last = (inside < inside[:, -1:]).sum(dim=-1, keepdim=True)
    offset = torch.minimum(torch.searchsorted(inside, targets - before, right=True), last)
    return (chunk * CHUNK_SIZE + offset)[:, 0].clamp_(max=vocab_size - 1)


def _top_bound(probabilities: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float32]) -> torch.Tensor:
    """The lowest probability that top_k, then top_p of what is left, keep: [num_rows, 1]."""
    vocab_size = probabilities.shape[1]
    top_k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
    num_sorted = min(FIRST_LOOK, vocab_size)
    bound, is_enough = _bound_among(_highest(probabilities, num_sorted), top_k, top_p, vocab_size)
    short = _short(is_enough, top_k > num_sorted)
    for rows in np.split(short, range(ROWS_SORTED, len(short), ROWS_SORTED)) if len(short) else []:
        on_device = upload(rows, probabilities.device)
        every = _highest(probabilities[on_device], vocab_size)
        bound[on_device] = _bound_among(every, top_k[rows], top_p[rows], vocab_size)[0]
    return bound


def _short(is_enough: torch.Tensor, may_be_short: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows to sort in full. A GPU sorts all that might need it: to hear which do would mean to wait for its queue."""
    return np.flatnonzero(may_be_short & ~is_enough.numpy() if is_enough.device.type == "cpu" else may_be_short)


def _bound_among(
    highest: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float32], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds, [num_rows, 1], from some highest probabilities, in falling order; and whether those were enough."""
    num_sorted = highest.shape[1]
    limits = _column(top_k, highest)
    ranks = torch.arange(num_sorted, device=highest.device)
    cumulative = highest.double().masked_fill_(ranks >= limits, 0.0).cumsum(dim=-1)
    total = torch.where(limits < vocab_size, cumulative[:, -1:], 1.0)
    wanted = _column(top_p.astype(np.float64), highest) * total
    num_kept = torch.minimum((cumulative < wanted).sum(dim=-1, keepdim=True) + 1, limits)
    bound = highest.gather(1, (num_kept - 1).clamp(max=num_sorted - 1))
    is_enough = (limits <= num_sorted) | ((limits == vocab_size) & (num_kept <= num_sorted))
    return bound, is_enough[:, 0]


def _highest(probabilities: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest of each row, in falling order."""
    rest = probabilities.shape[1] - count
    if probabilities.device.type != "cpu":
        ordered = probabilities.topk(count, dim=-1) if rest > 0 else probabilities.sort(dim=-1, descending=True)
        return ordered.values
    # numpy sorts values with vector instructions: ten times faster than torch, which keeps track of indices.
    values = probabilities.numpy()
    if rest > 0:
        values = np.partition(values, rest, axis=-1)[:, rest:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def _column(values: NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1], on the device of `like`."""
    return upload(values, like.device)[:, None]
