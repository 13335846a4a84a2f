"""The persistent batch: what the worker knows of each sequence, kept from plan to plan in columns.

Owns tokens, block tables, progress and sampler parameters. Touches no tensor: numpy only, vectorised over the
sequences of a plan, since it runs in the gap between two steps.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from worker.errors import ProtocolError
from worker.wire import AddedSequence, Plan, SamplerParams


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What plans must keep to: tokens per block, sequences and tokens of a step, tokens of a sequence."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Who samples in a step, one entry each. forbidden: (entry, token ids that must not be sampled)."""

    temperatures: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    output_indexes: NDArray[np.int64]
    forbidden: tuple[tuple[int, tuple[int, ...]], ...]

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
class StepInputs:
    """One ragged forward over the num_seqs sequences that have tokens to run.

    input_ids, positions, slot_mapping: [num_tokens] int64. cu_seqlens_q: [num_seqs + 1] int32. context_lens: [num_seqs]
    int64. block_tables: [num_seqs, max_blocks] int32. logit_rows: [num_samples] int64, the tokens that sample.
    rows, num_run, sampling: per scheduled sequence, for `Batch.commit`.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    cu_seqlens_q: NDArray[np.int32]
    query_lens: NDArray[np.int64]
    context_lens: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    logit_rows: NDArray[np.int64]
    sampled: SampledRows
    rows: NDArray[np.int64]
    num_run: NDArray[np.int64]
    sampling: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row that sampled: its token, and whether its logits were finite (else the token means nothing)."""

    token_ids: NDArray[np.int64]
    is_finite: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did to each scheduled sequence; see StepResult."""

    attempts: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    first_output_indexes: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    failed: NDArray[np.int64]


class Batch:
    """All sequences that the scheduler has added and not removed, each in a row of the columns."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._row_of: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._end_token_ids: dict[int, tuple[int, ...]] = {}
        max_blocks = -(-limits.max_model_len // limits.block_size)
        # One row to begin with; `_grow` doubles. Untouched rows of zeros take no memory.
        self._token_ids = np.zeros((0, limits.max_model_len), np.int32)
        self._block_tables = np.zeros((0, max_blocks), np.int32)
        self._num_blocks = np.zeros(0, np.int64)
        self._num_tokens = np.zeros(0, np.int64)
        self._num_prompt = np.zeros(0, np.int64)
        self._num_computed = np.zeros(0, np.int64)
        self._attempts = np.zeros(0, np.int64)
        self._min_tokens = np.zeros(0, np.int64)
        self._temperatures = np.zeros(0, np.float32)
        self._top_k = np.zeros(0, np.int64)
        self._top_p = np.zeros(0, np.float32)
        self._min_p = np.zeros(0, np.float32)
        self._seeds = np.zeros(0, np.uint64)
        self._grow(limits.max_num_seqs)

    def __len__(self) -> int:
        return len(self._row_of)

    def clear(self) -> None:
        """Forget all sequences."""
        self._row_of.clear()
        self._end_token_ids.clear()
        self._free_rows = list(range(len(self._num_tokens)))

    def apply(self, plan: Plan) -> StepInputs:
        """Make the plan's changes and return what it runs.

        Raises ProtocolError where it names an unknown sequence, or breaks a limit; the batch is then half changed.
        """
        for seq_id in plan.removed_seq_ids:
            self._remove(seq_id)
        for added in plan.added:
            self._add(added)
        if plan.appended_seq_ids:
            self._append_blocks(plan)
        return self._build(plan)

    def commit(self, inputs: StepInputs, sampled: Sampled) -> Progress:
        """Record what the step of `inputs` computed and sampled."""
        rows = inputs.rows
        self._num_computed[rows] += inputs.num_run
        first_output_indexes = self._num_tokens[rows] - self._num_prompt[rows]
        good = inputs.sampling[sampled.is_finite]
        token_ids = sampled.token_ids[sampled.is_finite]
        self._token_ids[rows[good], self._num_tokens[rows[good]]] = token_ids
        self._num_tokens[rows[good]] += 1
        num_tokens = np.zeros(len(rows), np.int64)
        num_tokens[good] = 1
        return Progress(
            attempts=self._attempts[rows],
            num_computed_tokens=self._num_computed[rows],
            first_output_indexes=first_output_indexes,
            num_tokens=num_tokens,
            token_ids=token_ids,
            failed=inputs.sampling[~sampled.is_finite],
        )

    def _remove(self, seq_id: int) -> None:
        row = self._row_of.pop(seq_id, None)
        if row is not None:
            self._end_token_ids.pop(row, None)
            self._free_rows.append(row)

    def _add(self, added: AddedSequence) -> None:
        """A sequence that is known already begins anew: its owner sent it in full."""
        self._remove(added.seq_id)
        num_tokens, num_blocks = len(added.token_ids), len(added.block_ids)
        if not 0 < num_tokens <= self._limits.max_model_len or num_blocks > self._block_tables.shape[1]:
            raise ProtocolError(
                f"sequence {added.seq_id} has {num_tokens} tokens and {num_blocks} blocks: "
                f"max_model_len is {self._limits.max_model_len}"
            )
        if not self._free_rows:
            self._grow(len(self._num_tokens))
        row = self._row_of[added.seq_id] = self._free_rows.pop()
        self._token_ids[row, :num_tokens] = added.token_ids
        self._block_tables[row, :num_blocks] = added.block_ids
        self._num_blocks[row] = num_blocks
        self._num_tokens[row] = num_tokens
        self._num_prompt[row] = added.num_prompt_tokens
        self._num_computed[row] = added.num_computed_tokens
        self._attempts[row] = added.attempt
        self._set_sampler(row, added.sampler)

    def _set_sampler(self, row: int, sampler: SamplerParams) -> None:
        self._temperatures[row] = sampler.temperature
        self._top_k[row] = sampler.top_k
        self._top_p[row] = sampler.top_p
        self._min_p[row] = sampler.min_p
        self._seeds[row] = sampler.seed
        self._min_tokens[row] = sampler.min_tokens
        if sampler.min_tokens and sampler.end_token_ids:
            self._end_token_ids[row] = sampler.end_token_ids

    def _append_blocks(self, plan: Plan) -> None:
        rows, counts = self._rows(plan.appended_seq_ids, plan), plan.appended_num_blocks
        ends = self._num_blocks[rows] + counts
        if int(ends.max()) > self._block_tables.shape[1]:
            raise ProtocolError(f"plan {plan.step_id} appends blocks past max_model_len={self._limits.max_model_len}")
        firsts = np.repeat(self._num_blocks[rows] - (np.cumsum(counts) - counts), counts)
        columns = firsts + np.arange(len(firsts))
        self._block_tables[np.repeat(rows, counts), columns] = plan.appended_block_ids
        self._num_blocks[rows] = ends

    def _rows(self, seq_ids: list[int], plan: Plan) -> NDArray[np.int64]:
        """The sequences' rows. Raises ProtocolError for an unknown or repeated one."""
        try:
            rows = np.fromiter(map(self._row_of.__getitem__, seq_ids), np.int64, len(seq_ids))
        except KeyError as error:
            raise ProtocolError(f"plan {plan.step_id} names sequence {error}, which was never added") from None
        if len(set(seq_ids)) != len(seq_ids):
            raise ProtocolError(f"plan {plan.step_id} names a sequence twice in one column")
        return rows

    def _build(self, plan: Plan) -> StepInputs:
        rows = self._rows(plan.scheduled_seq_ids, plan)
        computed, known = self._num_computed[rows], self._num_tokens[rows]
        # The plan's number is an upper bound: what was not sampled, because the sequence ended, cannot run.
        num_run = np.minimum(plan.num_scheduled_tokens, known - computed).clip(min=0)
        context_lens = computed + num_run
        self._check(plan, rows, num_run, context_lens)
        sampling = np.flatnonzero((context_lens == known) & (num_run > 0) & (known < self._limits.max_model_len))
        active = slice(None) if num_run.all() else num_run > 0
        query_lens, active_rows = num_run[active], rows[active]
        cu_seqlens_q = np.zeros(len(active_rows) + 1, np.int32)
        np.cumsum(query_lens, out=cu_seqlens_q[1:])

        token_rows = np.repeat(active_rows, query_lens)
        positions = np.repeat(computed[active] - cu_seqlens_q[:-1], query_lens) + np.arange(len(token_rows))
        block_ids = self._block_tables[token_rows, positions // self._limits.block_size]
        max_blocks = int(-(-context_lens[active].max() // self._limits.block_size)) if len(active_rows) else 0
        return StepInputs(
            input_ids=self._token_ids[token_rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=block_ids * np.int64(self._limits.block_size) + positions % self._limits.block_size,
            cu_seqlens_q=cu_seqlens_q,
            query_lens=query_lens,
            context_lens=context_lens[active],
            block_tables=self._block_tables[active_rows, :max_blocks],
            logit_rows=np.cumsum(num_run)[sampling] - 1,
            sampled=self._sampled_rows(rows[sampling]),
            rows=rows,
            num_run=num_run,
            sampling=sampling,
        )

    def _check(
        self, plan: Plan, rows: NDArray[np.int64], num_run: NDArray[np.int64], context_lens: NDArray[np.int64]
    ) -> None:
        """Raise ProtocolError for a plan that breaks a limit or writes past a sequence's blocks."""
        limits = self._limits
        num_tokens = int(num_run.sum())
        if len(rows) > limits.max_num_seqs or num_tokens > limits.max_num_batched_tokens:
            raise ProtocolError(
                f"plan {plan.step_id} runs {num_tokens} tokens of {len(rows)} sequences: the limits are "
                f"{limits.max_num_batched_tokens} and {limits.max_num_seqs}"
            )
        short = np.flatnonzero(context_lens > self._num_blocks[rows] * limits.block_size)
        if len(short):
            seq_id, row = plan.scheduled_seq_ids[short[0]], rows[short[0]]
            raise ProtocolError(
                f"plan {plan.step_id} runs sequence {seq_id} up to token {context_lens[short[0]]}: "
                f"it has {self._num_blocks[row]} blocks of {limits.block_size}"
            )

    def _sampled_rows(self, rows: NDArray[np.int64]) -> SampledRows:
        output_indexes = self._num_tokens[rows] - self._num_prompt[rows]
        forbidden: list[tuple[int, tuple[int, ...]]] = []
        if self._end_token_ids:
            early = np.flatnonzero(output_indexes < self._min_tokens[rows])
            forbidden = [(int(i), self._end_token_ids.get(int(rows[i]), ())) for i in early]
        return SampledRows(
            temperatures=self._temperatures[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            seeds=self._seeds[rows],
            output_indexes=output_indexes,
            forbidden=tuple(forbidden),
        )

    def _grow(self, num_rows: int) -> None:
        """Add rows: more sequences may be known than run in a step."""
        size = len(self._num_tokens)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                grown = np.zeros((size + num_rows, *column.shape[1:]), column.dtype)
                grown[:size] = column
                setattr(self, name, cast("NDArray[np.int64]", grown))
        self._free_rows.extend(range(size, size + num_rows))
