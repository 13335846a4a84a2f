"""The values that pass between batch, runner and sampler in one step. numpy only: the timer's worker has no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# What is kept of a sequence beside its tokens and blocks: one record each, so that one operation reads all of it.
SEQUENCE = np.dtype(
    [
        ("num_tokens", np.int64),
        ("num_prompt_tokens", np.int64),
        ("num_computed_tokens", np.int64),
        ("num_blocks", np.int64),
        ("attempt", np.int64),
        ("min_tokens", np.int64),
        ("seed", np.uint64),
        ("top_k", np.int64),
        ("num_candidates", np.int64),
        ("reports_logprobs", np.bool_),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What plans must keep to: tokens per block, sequences and tokens of a step, tokens of a sequence."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Who samples in a step, one entry each. forbidden: (entry, token ids that must not be sampled).

    num_candidates: likeliest tokens to report beside the sampled one; None where no entry wants any. reports_logprobs:
    whether to report the sampled token's log probability; None where no entry wants it.
    """

    temperatures: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    output_indexes: NDArray[np.int64]
    forbidden: tuple[tuple[int, tuple[int, ...]], ...]
    num_candidates: NDArray[np.int64] | None = None
    reports_logprobs: NDArray[np.bool_] | None = None

    def take(self, entries: NDArray[np.int64]) -> "SampledRows":
        """Some of the entries; their forbidden ids are dealt with already."""
        return SampledRows(
            temperatures=self.temperatures[entries],
            top_k=self.top_k[entries],
            top_p=self.top_p[entries],
            min_p=self.min_p[entries],
            seeds=self.seeds[entries],
            output_indexes=self.output_indexes[entries],
            forbidden=(),
        )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The plan's sequences, one entry each.

    rows: of the batch. before: SEQUENCE records before the step. num_computed_tokens: after it. sampling: the entries
    that sample; sampling_rows: their rows; sampled_places: where their tokens go in the batch's flat token ids.
    """

    rows: NDArray[np.int64]
    before: NDArray[np.void]
    num_computed_tokens: NDArray[np.int64]
    sampling: NDArray[np.int64]
    sampling_rows: NDArray[np.int64]
    sampled_places: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One ragged forward over the num_seqs sequences that have tokens to run.

    input_ids: [num_tokens] int64; a negative one, ~i, is fed: it is what entry i of the step before samples, which is
    still on its way. positions, slot_mapping: [num_tokens] int64. cu_seqlens_q: [num_seqs + 1] int32. query_lens,
    context_lens: [num_seqs] int64. block_tables: [num_seqs, max_blocks] int32. logit_rows: [num_samples] int64, the
    tokens that sample, and `sampled` how. steps_each: [num_seqs] int64, how many steps alike each sequence takes, this
    one included, in descending order. is_fed: whether any of input_ids is. samples_all: whether it is known that every
    token samples, each once, as in the common step of decodes.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    cu_seqlens_q: NDArray[np.int32]
    query_lens: NDArray[np.int64]
    context_lens: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    logit_rows: NDArray[np.int64]
    steps_each: NDArray[np.int64]
    sampled: SampledRows
    scheduled: Scheduled
    is_fed: bool = False
    samples_all: bool = False


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens after a sequence, best first, with their log probabilities."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row that sampled: its token, and whether its logits were finite (else the token means nothing).

    candidates: of the entries that wanted any. logprobs: of the tokens, by the model's own distribution; 0 for entries
    that did not ask, None where none did.
    """

    token_ids: NDArray[np.int64]
    is_finite: NDArray[np.bool_]
    candidates: Mapping[int, Candidates] = field(default_factory=dict)
    logprobs: NDArray[np.float32] | None = None

    @property
    def all_finite(self) -> bool:
        """Whether nothing failed."""
        return bool(self.is_finite.all())


@dataclass(frozen=True)
class SampledSteps:
    """Of steps that ran one after the other, one token of each sequence: its token, and whether its logits were finite.

    token_ids, is_finite: [num_steps, num_seqs]. Nothing finite follows what is not. steps_each: as in StepInputs.
    """

    token_ids: NDArray[np.int64]
    is_finite: NDArray[np.bool_]
    steps_each: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def num_steps(self) -> NDArray[np.int64]:
        """[num_seqs]: that each of them took."""
        return np.minimum(self.steps_each, len(self))

    @cached_property
    def is_sampled(self) -> NDArray[np.bool_]:
        """[num_steps, num_seqs]: whether the token means something."""
        found: NDArray[np.bool_] = self.is_finite & (np.arange(len(self))[:, None] < self.steps_each)
        return found

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """[num_seqs]: tokens that mean something."""
        found: NDArray[np.int64] = self.is_sampled.sum(axis=0)
        return found


@dataclass(frozen=True, slots=True)
class Progress:
    """What one or more steps did to each scheduled sequence; see StepResult. failed: whose logits were not finite."""

    attempts: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    first_output_indexes: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    failed: NDArray[np.int64]
    candidates: list[Candidates]
    token_logprobs: NDArray[np.float32] | None

    @classmethod
    def of(cls, scheduled: Scheduled, sampled: Sampled) -> "Progress":
        """Of a step that has run."""
        is_good = sampled.is_finite
        num_tokens = np.zeros(len(scheduled.rows), np.int64)
        num_tokens[scheduled.sampling[is_good]] = 1
        return cls(
            attempts=scheduled.before["attempt"],
            num_computed_tokens=scheduled.num_computed_tokens,
            first_output_indexes=scheduled.before["num_tokens"] - scheduled.before["num_prompt_tokens"],
            num_tokens=num_tokens,
            token_ids=sampled.token_ids[is_good],
            failed=scheduled.sampling[~is_good],
            candidates=[found for entry, found in sorted(sampled.candidates.items()) if is_good[entry]],
            token_logprobs=None if sampled.logprobs is None else sampled.logprobs[is_good],
        )

    @classmethod
    def of_steps(cls, scheduled: Scheduled, steps: SampledSteps) -> "Progress":
        """Of steps that have run, of which `scheduled` is the first."""
        num_tokens = steps.num_tokens
        return cls(
            attempts=scheduled.before["attempt"],
            # One that failed has run in the step in which it did, and in none behind it.
            num_computed_tokens=scheduled.num_computed_tokens + np.minimum(num_tokens, steps.num_steps - 1),
            first_output_indexes=scheduled.before["num_tokens"] - scheduled.before["num_prompt_tokens"],
            num_tokens=num_tokens,
            token_ids=steps.token_ids.T[steps.is_sampled.T],
            failed=np.flatnonzero(num_tokens < steps.num_steps),
            candidates=[],
            token_logprobs=None,
        )

    @classmethod
    def joined(cls, steps: Sequence["Progress"]) -> "Progress":
        """Of one step after the other: each sequence's tokens lie together.

        Later ones have the same scheduled sequences, or the first of them.
        """
        if len(steps) == 1:
            return steps[0]
        entries = np.arange(len(steps[0].attempts))
        num_computed_tokens, num_tokens = steps[0].num_computed_tokens.copy(), np.zeros(len(entries), np.int64)
        for step in steps:
            num_computed_tokens[: len(step.num_tokens)] = step.num_computed_tokens
            num_tokens[: len(step.num_tokens)] += step.num_tokens
        order = np.argsort(
            np.concatenate([np.repeat(entries[: len(step.num_tokens)], step.num_tokens) for step in steps]),
            kind="stable",
        )
        logprobs = None
        if any(step.token_logprobs is not None for step in steps):
            none = [np.zeros(len(step.token_ids), np.float32) for step in steps]
            own = [
                zeros if s.token_logprobs is None else s.token_logprobs for s, zeros in zip(steps, none, strict=True)
            ]
            logprobs = np.concatenate(own)[order]
        return cls(
            attempts=steps[0].attempts,
            num_computed_tokens=num_computed_tokens,
            first_output_indexes=steps[0].first_output_indexes,
            num_tokens=num_tokens,
            token_ids=np.concatenate([step.token_ids for step in steps])[order],
            failed=np.unique(np.concatenate([step.failed for step in steps])),
            candidates=[],
            token_logprobs=logprobs,
        )


def null_inputs(num_seqs: int, query_len: int) -> StepInputs:
    """A step of `num_seqs` sequences with `query_len` tokens each, all in the null block, sampled greedily."""
    tokens = np.zeros(num_seqs * query_len, np.int64)
    lens = np.full(num_seqs, query_len, np.int64)
    seqs = np.arange(num_seqs)
    none, none32 = np.zeros(num_seqs, np.int64), np.zeros(num_seqs, np.float32)
    return StepInputs(
        input_ids=tokens,
        positions=tokens,
        slot_mapping=np.tile(np.arange(query_len, dtype=np.int64), num_seqs),
        cu_seqlens_q=(np.arange(num_seqs + 1) * query_len).astype(np.int32),
        query_lens=lens,
        context_lens=lens,
        block_tables=np.zeros((num_seqs, 1), np.int32),
        logit_rows=(seqs + 1) * query_len - 1,
        steps_each=np.ones_like(seqs),
        sampled=SampledRows(none32, none, none32, none32, none.astype(np.uint64), none, ()),
        scheduled=Scheduled(seqs, np.zeros(num_seqs, SEQUENCE), lens, seqs, seqs, seqs),
        samples_all=query_len == 1,
    )
