"""The persistent batch: what the worker knows of each sequence, kept from plan to plan in columns.

Owns tokens, block tables, progress and sampler parameters. Touches no tensor: numpy only, vectorised over the
sequences of a plan. A step goes through `apply` (what it will run), `begin` and `commit`. The next may be applied and
begin before the `commit`, that is, while the step runs: all that it changes is known by then but the tokens that it
samples, and for those stand marks (see `StepInputs.input_ids`).
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from worker.errors import ProtocolError
from worker.step import SEQUENCE, BatchLimits, Sampled, SampledRows, SampledSteps, Scheduled, StepInputs
from worker.wire import AddedSequence, Plan


class Batch:
    """All sequences that the scheduler has added and not removed, each in a row of the columns."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._row_of: dict[int, int] = {}
        self._end_token_ids: dict[int, tuple[int, ...]] = {}
        self._last_rows: tuple[list[int], NDArray[np.int64]] | None = None
        # More sequences may be known than run in a step: then rows are added. Untouched zeros take no memory.
        self._free_rows = list(range(limits.max_num_seqs))
        # For each step that has begun, the rows that went since: it will still write its tokens into its rows.
        self._freed_after: deque[list[int]] = deque()
        self._sequences = np.zeros(limits.max_num_seqs, SEQUENCE)
        self._token_ids = np.zeros((limits.max_num_seqs, limits.max_model_len), np.int64)
        self._flat_token_ids = self._token_ids.reshape(-1)
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._block_tables = np.zeros((limits.max_num_seqs, max_blocks), np.int32)
        self._one_each = np.arange(limits.max_num_seqs + 1, dtype=np.int32)
        self._marks = ~np.arange(limits.max_num_seqs)

    def __len__(self) -> int:
        return len(self._row_of)

    def clear(self) -> None:
        """Forget all sequences."""
        for seq_id in list(self._row_of):
            self._remove(seq_id)

    def apply(self, plan: Plan) -> StepInputs:
        """Make the plan's changes; what its first step runs, as if the one that runs sampled all that it is to.

        Raises ProtocolError where it names an unknown sequence, or breaks a limit; the batch is then half changed.
        """
        for seq_id in plan.removed_seq_ids:
            self._remove(seq_id)
        for added in plan.added:
            self._add(added)
        if plan.appended_seq_ids:
            self._append_blocks(plan)
        if plan.replaced_seq_ids:
            self._replace_last(plan)
        if plan.num_steps > 1:
            self._check_steps(plan)
        return self._build(plan)

    def again(self, plan: Plan, step: int) -> StepInputs:
        """What the plan's step `step` runs, 0 being the first; the one before has begun."""
        return self._build(plan, step)

    def begin(self, inputs: StepInputs) -> None:
        """Count the step as done, but for its tokens; the one before the last has been committed."""
        scheduled = inputs.scheduled
        self._freed_after.append([])
        self._sequences["num_computed_tokens"][scheduled.rows] = scheduled.num_computed_tokens
        self._sequences["num_tokens"][scheduled.sampling_rows] += 1
        self._flat_token_ids[scheduled.sampled_places] = self._marks[: len(scheduled.sampled_places)]

    def commit(self, inputs: StepInputs, sampled: Sampled) -> None:
        """Record what the step that began with `inputs`, the oldest that is not committed, sampled.

        A sequence that failed has nothing left to run. If it runs in the next step already, it fails there too.
        """
        scheduled = inputs.scheduled
        places, token_ids = scheduled.sampled_places, sampled.token_ids
        if not sampled.all_finite:
            is_good = sampled.is_finite
            failed = scheduled.sampling_rows[~is_good]
            known, computed = self._sequences["num_tokens"], self._sequences["num_computed_tokens"]
            known[failed] -= 1
            computed[failed] = np.minimum(computed[failed], known[failed])
            places, token_ids = places[is_good], token_ids[is_good]
        self._flat_token_ids[places] = token_ids
        self._free_rows += self._freed_after.popleft()

    def commit_steps(self, inputs: StepInputs, steps: SampledSteps) -> None:
        """Record steps that were run at once, the first with `inputs`; none of them has begun, and no other runs."""
        scheduled, num_tokens = inputs.scheduled, steps.num_tokens
        rows, known = scheduled.sampling_rows, scheduled.before["num_tokens"]
        self._sequences["num_tokens"][rows] = known + num_tokens
        # As in `commit`: a sequence that failed has nothing left to run.
        self._sequences["num_computed_tokens"][rows] = np.minimum(
            scheduled.num_computed_tokens + steps.num_steps - 1, known + num_tokens
        )
        places = scheduled.sampled_places + np.arange(len(steps))[:, None]
        self._flat_token_ids[places[steps.is_sampled]] = steps.token_ids[steps.is_sampled]

    def _remove(self, seq_id: int) -> None:
        row = self._row_of.pop(seq_id, None)
        if row is not None:
            self._last_rows = None
            self._end_token_ids.pop(row, None)
            (self._freed_after[-1] if self._freed_after else self._free_rows).append(row)

    def _add(self, added: AddedSequence) -> None:
        """A sequence that is known already begins anew: its owner sent it in full."""
        self._remove(added.seq_id)
        num_computed, num_blocks = added.num_computed_tokens, len(added.block_ids)
        num_tokens = num_computed + len(added.token_ids)
        if not 0 < num_tokens <= self._limits.max_model_len or num_blocks > self._block_tables.shape[1]:
            raise ProtocolError(
                f"sequence {added.seq_id} has {num_tokens} tokens and {num_blocks} blocks: "
                f"max_model_len is {self._limits.max_model_len}"
            )
        if added.num_prompt_tokens > num_tokens:
            raise ProtocolError(
                f"sequence {added.seq_id} has {num_tokens} tokens, {added.num_prompt_tokens} of them prompt"
            )
        row = self._row_of[added.seq_id] = self._free_rows.pop() if self._free_rows else self._add_rows()
        sampler = added.sampler
        self._token_ids[row, num_computed:num_tokens] = added.token_ids
        self._block_tables[row, :num_blocks] = added.block_ids
        self._sequences[row] = (
            *(num_tokens, added.num_prompt_tokens, num_computed, num_blocks, added.attempt),
            *(sampler.min_tokens, sampler.seed, sampler.top_k, sampler.num_candidates, sampler.reports_logprobs),
            *(sampler.temperature, sampler.top_p, sampler.min_p),
        )
        if sampler.min_tokens and sampler.end_token_ids:
            self._end_token_ids[row] = sampler.end_token_ids

    def _add_rows(self) -> int:
        """Double the rows; one of the new ones, the others are free."""
        size = len(self._sequences)
        self._sequences = np.concatenate((self._sequences, np.zeros_like(self._sequences)))
        self._token_ids = np.concatenate((self._token_ids, np.zeros_like(self._token_ids)))
        self._flat_token_ids = self._token_ids.reshape(-1)
        self._block_tables = np.concatenate((self._block_tables, np.zeros_like(self._block_tables)))
        self._free_rows.extend(range(size + 1, 2 * size))
        return size

    def _append_blocks(self, plan: Plan) -> None:
        rows, counts = self._rows(plan.appended_seq_ids, plan), plan.appended_num_blocks
        before = self._sequences["num_blocks"][rows]
        after = before + counts
        if int(after.max()) > self._block_tables.shape[1]:
            raise ProtocolError(f"plan {plan.step_id} appends blocks past max_model_len={self._limits.max_model_len}")
        firsts = np.repeat(before - (np.cumsum(counts) - counts), counts)
        self._block_tables[np.repeat(rows, counts), firsts + np.arange(len(firsts))] = plan.appended_block_ids
        self._sequences["num_blocks"][rows] = after

    def _replace_last(self, plan: Plan) -> None:
        """The scheduler has chosen other tokens than those that were sampled last."""
        rows = self._rows(plan.replaced_seq_ids, plan)
        self._token_ids[rows, self._sequences["num_tokens"][rows] - 1] = plan.replaced_token_ids

    def _rows(self, seq_ids: list[int], plan: Plan) -> NDArray[np.int64]:
        """The sequences' rows. Raises ProtocolError for an unknown or repeated one."""
        try:
            rows = np.fromiter(map(self._row_of.__getitem__, seq_ids), np.int64, len(seq_ids))
        except KeyError as error:
            raise ProtocolError(f"plan {plan.step_id} names sequence {error}, which was never added") from None
        if len(set(seq_ids)) != len(seq_ids):
            raise ProtocolError(f"plan {plan.step_id} names a sequence twice in one column")
        return rows

    def _scheduled_rows(self, plan: Plan) -> NDArray[np.int64]:
        """Mostly the plan before scheduled the same sequences: then their rows are at hand."""
        if self._last_rows is None or self._last_rows[0] != plan.scheduled_seq_ids:
            self._last_rows = (plan.scheduled_seq_ids, self._rows(plan.scheduled_seq_ids, plan))
        return self._last_rows[1]

    def _build(self, plan: Plan, step: int = 0) -> StepInputs:
        rows, num_scheduled = self._scheduled_rows(plan), plan.num_scheduled_tokens
        steps_each = np.ones_like(num_scheduled)
        if plan.num_steps > 1:
            steps_each = num_scheduled[num_scheduled > step] - step
            rows, num_scheduled = rows[: len(steps_each)], np.ones_like(steps_each)
        before = self._sequences[rows]
        known, computed = before["num_tokens"], before["num_computed_tokens"]
        # The plan's number is an upper bound: what was not sampled, because the sequence ended, cannot run.
        num_run = np.minimum(num_scheduled, known - computed)
        context_lens = computed + num_run
        num_tokens = self._check(plan, num_run, context_lens, before)
        samples = (num_run > 0) | self._forks(plan, num_scheduled, known, context_lens)
        sampling = np.flatnonzero(samples & (context_lens == known) & (known < self._limits.max_model_len))
        scheduled = self._scheduled(rows, before, context_lens, sampling)
        if num_tokens == len(rows) and num_run.all():  # one token each: nothing is ragged
            token_rows, positions, logit_rows = rows, computed, sampling
            cu_seqlens_q = self._one_each[: num_tokens + 1]
        else:
            logit_rows = np.cumsum(num_run)[sampling] - 1  # a fork has no tokens here: its row is the one before it
            if not num_run.all():
                active = np.flatnonzero(num_run)
                columns = rows, computed, num_run, context_lens, steps_each
                rows, computed, num_run, context_lens, steps_each = (column[active] for column in columns)
            cu_seqlens_q = np.zeros(len(rows) + 1, np.int32)
            np.cumsum(num_run, out=cu_seqlens_q[1:])
            token_rows = np.repeat(rows, num_run)
            positions = np.repeat(computed - cu_seqlens_q[:-1], num_run) + np.arange(num_tokens)

        input_ids = np.take(self._flat_token_ids, token_rows * self._limits.max_model_len + positions)
        block_size = self._limits.block_size
        # Of all steps of the plan: the runner may do them at once.
        longest = int((context_lens + steps_each).max(initial=1)) - 1
        max_blocks = min(-(-longest // block_size), self._block_tables.shape[1])
        block_ids = self._block_tables[token_rows, positions // block_size]
        return StepInputs(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=block_ids * np.int64(block_size) + positions % block_size,
            cu_seqlens_q=cu_seqlens_q,
            query_lens=num_run,
            context_lens=context_lens,
            block_tables=self._block_tables[rows, :max_blocks],
            logit_rows=logit_rows,
            steps_each=steps_each,
            sampled=self._sampled_rows(scheduled),
            scheduled=scheduled,
            is_fed=bool(self._freed_after) and bool((input_ids < 0).any()),  # marks are of steps that have begun
            samples_all=logit_rows is sampling and len(sampling) == len(scheduled.rows),
        )

    def _forks(
        self,
        plan: Plan,
        num_scheduled: NDArray[np.int64],
        known: NDArray[np.int64],
        context_lens: NDArray[np.int64],
    ) -> NDArray[np.bool_] | np.bool_:
        """Which of the plan's sequences sample from what the one before them runs. Raises ProtocolError."""
        is_fork: NDArray[np.bool_] = num_scheduled == 0
        if not is_fork.any():
            return np.False_
        parents = np.maximum.accumulate(np.where(is_fork, -1, np.arange(len(is_fork))))
        is_bad = is_fork & ((parents < 0) | (known != known[parents]) | (context_lens != context_lens[parents]))
        if is_bad.any():
            seq_id = plan.scheduled_seq_ids[int(is_bad.argmax())]
            raise ProtocolError(f"plan {plan.step_id} forks sequence {seq_id} from one that does not end its prompt")
        return is_fork

    def _scheduled(
        self,
        rows: NDArray[np.int64],
        before: NDArray[np.void],
        num_computed_tokens: NDArray[np.int64],
        sampling: NDArray[np.int64],
    ) -> Scheduled:
        is_all = len(sampling) == len(rows)
        sampling_rows = rows if is_all else rows[sampling]
        ends = before["num_tokens"] if is_all else before["num_tokens"][sampling]
        return Scheduled(
            rows=rows,
            before=before,
            num_computed_tokens=num_computed_tokens,
            sampling=sampling,
            sampling_rows=sampling_rows,
            sampled_places=sampling_rows * self._limits.max_model_len + ends,
        )

    def _check(
        self, plan: Plan, num_run: NDArray[np.int64], context_lens: NDArray[np.int64], before: NDArray[np.void]
    ) -> int:
        """The tokens that run. Raises ProtocolError where they break a limit or go past a sequence's blocks."""
        limits = self._limits
        num_tokens = int(num_run.sum())
        if len(num_run) > limits.max_num_seqs or num_tokens > limits.max_num_batched_tokens:
            raise ProtocolError(
                f"plan {plan.step_id} runs {num_tokens} tokens of {len(num_run)} sequences: the limits are "
                f"{limits.max_num_batched_tokens} and {limits.max_num_seqs}"
            )
        self._check_blocks(plan, np.where(num_run > 0, context_lens, 0), before["num_blocks"])
        return num_tokens

    def _check_blocks(self, plan: Plan, ends: NDArray[np.int64], num_blocks: NDArray[np.int64]) -> None:
        """ends: the tokens of each scheduled sequence that its blocks must hold. Raises ProtocolError."""
        is_short = ends > num_blocks * self._limits.block_size
        if is_short.any():
            entry = int(is_short.argmax())
            raise ProtocolError(
                f"plan {plan.step_id} runs sequence {plan.scheduled_seq_ids[entry]} up to token {ends[entry]}: "
                f"it has {num_blocks[entry]} blocks of {self._limits.block_size}"
            )

    def _check_steps(self, plan: Plan) -> None:
        """Of a plan of more than one: the first step is checked as any. Raises ProtocolError."""
        sequences, steps_each = self._sequences[self._scheduled_rows(plan)], plan.num_scheduled_tokens
        is_falling = not (np.diff(steps_each, append=1) > 0).any()
        if sequences["num_candidates"].any() or not is_falling or steps_each.max(initial=0) != plan.num_steps:
            raise ProtocolError(
                f"plan {plan.step_id} has {plan.num_steps} steps, which are not decodes of fewer and fewer sequences"
            )
        self._check_blocks(plan, sequences["num_computed_tokens"] + steps_each, sequences["num_blocks"])

    def _sampled_rows(self, scheduled: Scheduled) -> SampledRows:
        sampling = scheduled.sampling
        records = scheduled.before if len(sampling) == len(scheduled.rows) else scheduled.before[sampling]
        output_indexes = records["num_tokens"] - records["num_prompt_tokens"]
        forbidden: list[tuple[int, tuple[int, ...]]] = []
        if self._end_token_ids:
            rows = scheduled.rows[sampling]
            early = np.flatnonzero(output_indexes < records["min_tokens"])
            forbidden = [(int(i), self._end_token_ids.get(int(rows[i]), ())) for i in early]
        num_candidates, reports_logprobs = records["num_candidates"], records["reports_logprobs"]
        return SampledRows(
            temperatures=records["temperature"],
            top_k=records["top_k"],
            top_p=records["top_p"],
            min_p=records["min_p"],
            seeds=records["seed"],
            output_indexes=output_indexes,
            forbidden=tuple(forbidden),
            num_candidates=num_candidates if num_candidates.any() else None,
            reports_logprobs=reports_logprobs if reports_logprobs.any() else None,
        )
