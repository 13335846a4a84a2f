"""Chooses tokens from logits.

A row's choice is a function of its logits, its parameters, its seed and its output index: of nothing else in the
batch. Greedy rows take the lowest id of the highest logit. The others are sampled at a number that splitmix64 draws
from (seed, output index).
"""

import numpy as np
import torch

from kernels import Draws, Kernels
from kernels.upload import upload
from worker.rng import uniforms
from worker.step import Sampled, SampledRows

# Lower temperatures are greedy: nothing but the argmax would have a probability, and quotients might overflow.
MIN_TEMPERATURE = 1e-5


def choose(logits: torch.Tensor, rows: SampledRows, kernels: Kernels) -> torch.Tensor:
    """Token ids, and whether the logits were finite (1 or 0): [2, num_rows] int64, on the device of the logits.

    logits: [num_rows, vocab_size] float32, overwritten where min_tokens forbids ids. Waits for nothing on a GPU.
    """
    choices = kernels.greedy(logits)
    token_ids = choices[0]
    forbidden = [(row, token_id) for row, ids in rows.forbidden for token_id in ids if token_id < logits.shape[1]]
    if forbidden:
        pairs = np.array(forbidden)
        early, never = upload(pairs.T, logits.device)
        logits[early, never] = float("-inf")
        early = upload(np.unique(pairs[:, 0]), logits.device)
        token_ids[early] = logits[early].argmax(dim=-1)
    random = np.flatnonzero(rows.temperatures >= MIN_TEMPERATURE)
    if len(random):
        draws = Draws(
            rows=random,
            temperatures=rows.temperatures[random],
            top_k=rows.top_k[random],
            top_p=rows.top_p[random],
            min_p=rows.min_p[random],
            uniforms=uniforms(rows.seeds[random], rows.output_indexes[random]),
        )
        token_ids[upload(random, logits.device)] = kernels.sample(logits, draws)
    return choices


def to_sampled(choices: torch.Tensor) -> Sampled:
    """`choices` of `choose` that have come to the host."""
    token_ids, is_finite = choices.numpy()
    return Sampled(token_ids, is_finite.astype(np.bool_))
