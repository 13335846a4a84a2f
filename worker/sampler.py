"""Chooses tokens from logits.

A row's choice is a function of its logits, its parameters, its seed and its output index: of nothing else in the
batch. Greedy rows take the lowest id of the highest logit. The others are sampled at a number that splitmix64 draws
from (seed, output index).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import Draws, Kernels
from kernels.upload import upload
from worker.rng import uniforms
from worker.step import Candidates, Sampled, SampledRows

# Lower temperatures are greedy: nothing but the argmax would have a probability, and quotients might overflow.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Choices:
    """What a step chose, on the device of its logits.

    tokens: [2, num_rows] int64: token ids, and whether the logits were finite (1 or 0). likeliest: of the entries that
    want candidates, as many as the one that wants most: log probabilities, ids: [num_entries, most], best first.
    num_candidates: by entry, what each wants. logprobs: [num_reporting] float32, of the tokens of the entries
    `reporting`.
    """

    tokens: torch.Tensor
    likeliest: tuple[torch.Tensor, torch.Tensor] | None = None
    num_candidates: Mapping[int, int] = field(default_factory=dict)
    reporting: NDArray[np.int64] | None = None
    logprobs: torch.Tensor | None = None

    def to_host(self) -> "Choices":
        """A copy on the host, without waiting for it on a GPU."""
        likeliest = None if self.likeliest is None else (_to_host(self.likeliest[0]), _to_host(self.likeliest[1]))
        logprobs = None if self.logprobs is None else _to_host(self.logprobs)
        return replace(self, tokens=_to_host(self.tokens), likeliest=likeliest, logprobs=logprobs)


def is_plain(rows: SampledRows) -> bool:
    """Whether all of them want a token, any that the model makes, and nothing else."""
    return not rows.forbidden and rows.num_candidates is None and rows.reports_logprobs is None


def draws_of(rows: SampledRows, num_steps: int = 1) -> Draws | None:
    """What is random in this step and those behind it, each an output further; None where all is greedy."""
    random = np.flatnonzero(rows.temperatures >= MIN_TEMPERATURE)
    if not len(random):
        return None
    output_indexes = rows.output_indexes[random] + np.arange(num_steps)[:, None]
    drawn = uniforms(rows.seeds[random], output_indexes)
    return Draws(
        rows=random,
        temperatures=rows.temperatures[random],
        top_k=rows.top_k[random],
        top_p=rows.top_p[random],
        min_p=rows.min_p[random],
        uniforms=drawn if num_steps > 1 else drawn[0],
    )


def choose(logits: torch.Tensor, rows: SampledRows, kernels: Kernels) -> Choices:
    """Chooses a token for each row, and finds the candidates of those that want any.

    logits: [num_rows, vocab_size] float32, overwritten where min_tokens forbids ids. Waits for nothing on a GPU.
    """
    tokens = kernels.greedy(logits)
    choices = Choices(tokens) if rows.num_candidates is None else _with_candidates(tokens, logits, rows.num_candidates)
    reporting = None if rows.reports_logprobs is None else np.flatnonzero(rows.reports_logprobs)
    draws = draws_of(rows)
    if reporting is None and not rows.forbidden and draws is None:
        return choices
    # Taken now: what is forbidden below is none of the model's own.
    distribution = None if reporting is None else logits[upload(reporting, logits.device)].log_softmax(dim=-1)
    token_ids = tokens[0]
    forbidden = [(row, token_id) for row, ids in rows.forbidden for token_id in ids if token_id < logits.shape[1]]
    if forbidden:
        pairs = np.array(forbidden)
        early, never = upload(pairs.T, logits.device)
        logits[early, never] = float("-inf")
        early = upload(np.unique(pairs[:, 0]), logits.device)
        token_ids[early] = logits[early].argmax(dim=-1)
    if draws is not None:
        token_ids[upload(draws.rows, logits.device)] = kernels.sample(logits, draws)
    if reporting is None or distribution is None:
        return choices
    # The id of a row that is not finite may be any: none is looked up out of range.
    chosen = token_ids[upload(reporting, logits.device)].clamp(0, logits.shape[1] - 1)
    return replace(choices, reporting=reporting, logprobs=distribution.gather(1, chosen[:, None])[:, 0])


def _with_candidates(tokens: torch.Tensor, logits: torch.Tensor, wanted: NDArray[np.int64]) -> Choices:
    entries = np.flatnonzero(wanted)
    logprobs = torch.log_softmax(logits[upload(entries, logits.device)], dim=-1)
    values, token_ids = logprobs.topk(min(int(wanted.max()), logits.shape[1]))
    return Choices(tokens, (values, token_ids), {entry: int(wanted[entry]) for entry in entries.tolist()})


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", non_blocking=True)


def to_sampled(choices: Choices) -> Sampled:
    """`choices` that have come to the host."""
    token_ids, is_finite = choices.tokens.numpy()
    candidates: dict[int, Candidates] = {}
    if choices.likeliest is not None:
        logprobs, ids = (part.tolist() for part in choices.likeliest)
        for i, (entry, count) in enumerate(choices.num_candidates.items()):
            candidates[entry] = Candidates(ids[i][:count], logprobs[i][:count])
    own: NDArray[np.float32] | None = None
    if choices.reporting is not None and choices.logprobs is not None:
        own = np.zeros(len(token_ids), np.float32)
        own[choices.reporting] = choices.logprobs.numpy()
    return Sampled(token_ids, is_finite.astype(np.bool_), candidates, own)
