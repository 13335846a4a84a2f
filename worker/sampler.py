"""Chooses tokens from logits.

A row's choice is a function of its logits, its parameters, its seed and its output index: of nothing else in the
batch. Greedy rows take the lowest id of the highest logit. The others: temperature, then top_k, top_p and min_p, each
a lower bound on probability, so that no order among equals matters (equals at the border stay in), then the inverse
of the cumulative distribution in order of ids, at a number that splitmix64 draws from (seed, output index).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from worker.rng import uniforms
from worker.step import Sampled, SampledRows

# Most probabilities that are looked at for top_k and top_p before a row is sorted in full.
FIRST_LOOK = 256


def sample(logits: torch.Tensor, rows: SampledRows) -> Sampled:
    """logits: [num_rows, vocab_size] float32, overwritten where min_tokens forbids ids."""
    is_finite = logits.sum(dim=-1).isfinite()
    for row, forbidden in rows.forbidden:
        logits[row, [token_id for token_id in forbidden if token_id < logits.shape[1]]] = float("-inf")
    token_ids = logits.argmax(dim=-1)
    random = np.flatnonzero(rows.temperatures > 0)
    if len(random):
        on_device = torch.from_numpy(random).to(logits.device)
        token_ids[on_device] = _sample_random(logits[on_device], rows.take(random))
    both = torch.stack((token_ids, is_finite.long())).cpu().numpy()
    return Sampled(both[0], both[1].astype(np.bool_))


def _sample_random(logits: torch.Tensor, rows: SampledRows) -> torch.Tensor:
    """Token ids [num_rows]; no temperature is 0. Cumulative sums are float64: no order of summation shows."""

    def column(values: NDArray[np.float64] | NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(values).to(logits.device)[:, None]

    centred = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = (centred / column(rows.temperatures)).softmax(dim=-1)
    bound = column(rows.min_p) * probabilities.amax(dim=-1, keepdim=True)
    limited = np.flatnonzero((rows.top_k > 0) | (rows.top_p < 1))
    if len(limited):
        on_device = torch.from_numpy(limited).to(logits.device)
        top_bound = _top_bound(probabilities[on_device], rows.take(limited))
        bound[on_device] = torch.maximum(bound[on_device], top_bound)
    kept = probabilities.masked_fill(probabilities < bound, 0.0).double()
    cumulative = kept.cumsum(dim=-1)
    targets = column(uniforms(rows.seeds, rows.output_indexes)) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _top_bound(probabilities: torch.Tensor, rows: SampledRows) -> torch.Tensor:
    """The lowest probability that top_k, then top_p of what is left, keep: [num_rows, 1]."""
    vocab_size = probabilities.shape[1]
    top_k = np.where(rows.top_k > 0, np.minimum(rows.top_k, vocab_size), vocab_size)
    num_looked_at = min(FIRST_LOOK, vocab_size)
    bound, is_enough = _bound_among(probabilities, top_k, rows.top_p, num_looked_at)
    short = (~is_enough).nonzero()[:, 0]
    if len(short) and num_looked_at < vocab_size:
        on_host = short.cpu().numpy()
        bound[short] = _bound_among(probabilities[short], top_k[on_host], rows.top_p[on_host], vocab_size)[0]
    return bound


def _bound_among(
    probabilities: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float32], num_looked_at: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds, [num_rows, 1], from the `num_looked_at` highest probabilities; and whether those were enough."""
    device, vocab_size = probabilities.device, probabilities.shape[1]
    highest = probabilities.topk(num_looked_at, dim=-1).values
    limits = torch.from_numpy(top_k).to(device)[:, None]
    ranks = torch.arange(num_looked_at, device=device)
    cumulative = highest.double().masked_fill_(ranks >= limits, 0.0).cumsum(dim=-1)
    total = torch.where(limits < vocab_size, cumulative[:, -1:], 1.0)
    wanted = torch.from_numpy(top_p.astype(np.float64)).to(device)[:, None] * total
    num_kept = torch.minimum((cumulative < wanted).sum(dim=-1, keepdim=True) + 1, limits)
    bound = highest.gather(1, (num_kept - 1).clamp(max=num_looked_at - 1))
    is_enough = (limits <= num_looked_at) | ((limits == vocab_size) & (num_kept <= num_looked_at))
    return bound, is_enough[:, 0]
