"""Shares out a step's token budget among the sequences that run.

Decodes come first, so that no prompt holds them up; what a prompt gets is a chunk of it. Knows which blocks Redis has
acknowledged, and plans no token beyond them.
"""

from typing import NamedTuple

from scheduler.admitter import Admitter, PlannerLimits
from scheduler.block_manager import BlockManager
from scheduler.forks import Forks
from scheduler.sequence import Sequence


class ScheduledRow(NamedTuple):
    """One sequence's part in a plan. num_tokens: 0 where it samples from what the row before it has run."""

    sequence: Sequence
    attempt: int
    num_tokens: int
    num_samples: int
    """0 where the plan does not reach the sequence's last token; else the worker samples the next, in each step."""


class StepRows:
    """Makes the rows of plan after plan."""

    def __init__(self, limits: PlannerLimits, blocks: BlockManager, forks: Forks, admitter: Admitter) -> None:
        self._limits = limits
        self._blocks = blocks
        self._forks = forks
        self._admitter = admitter

    def num_alike(self, running: list[Sequence], most: int) -> int:
        """How many of the next steps, `most` at most, are decodes of the same sequences, or of fewer and fewer of them
        as they reach their last tokens; at least 1.
        """
        block_size, forks = self._limits.block_size, self._forks
        if most <= 1 or forks.leaders or forks.num_begun or len(running) > self._limits.max_num_batched_tokens:
            return 1
        longest, has_room = 0, most
        for sequence in running:
            num_tokens = sequence.num_unplanned_tokens
            if num_tokens <= 0 and not sequence.num_candidates:
                continue  # its end is planned
            if num_tokens != 1 or sequence.num_candidates or sequence.num_arriving_blocks:
                return 1
            capacity = sequence.num_acked_blocks * block_size - sequence.num_planned_tokens
            num_left = sequence.num_unsampled_tokens
            longest = max(longest, num_left)
            if capacity < num_left:
                has_room = min(has_room, capacity)
        return max(1, min(longest, has_room))

    def share_out(self, running: list[Sequence], num_steps: int = 1) -> list[ScheduledRow]:
        """The next step of what runs: one token of each sequence that decodes, the rest of the budget for prompts.

        Or the next num_steps together, where `num_alike` says so: whoever takes more of them comes first.
        """
        budget = self._limits.max_num_batched_tokens
        rows: list[ScheduledRow] = []
        prefills: list[tuple[Sequence, int]] = []
        block_size, leaders = self._limits.block_size, self._forks.leaders
        for sequence in running:
            num_tokens = sequence.num_unplanned_tokens
            if num_tokens <= 0 or sequence.num_arriving_blocks:
                continue
            capacity = sequence.num_acked_blocks * block_size - sequence.num_planned_tokens
            if capacity <= 0:
                continue
            if num_tokens > 1:
                prefills.append((sequence, capacity))
            elif budget > 0:
                # The last known token, or the one that is being sampled: it always samples the next.
                num_decodes = min(num_steps, sequence.num_unsampled_tokens)
                sequence.num_planned_tokens += num_decodes
                sequence.num_plans_in_flight += 1
                sequence.num_planned_samples += num_decodes
                rows.append(ScheduledRow(sequence, sequence.attempt, num_decodes, num_decodes))
                budget -= 1
                if leaders and sequence.seq_id in leaders:
                    rows += self._begin_forks(sequence, len(running))
        if num_steps > 1:
            rows.sort(key=lambda row: -row.num_tokens)
        for sequence, capacity in prefills:
            if budget <= 0:
                break
            row = _row(sequence, min(sequence.num_unplanned_tokens, capacity, budget))
            rows.append(row)
            budget -= row.num_tokens
            if row.num_samples:
                rows += self._begin_forks(sequence, len(running))
        return rows

    def _begin_forks(self, leader: Sequence, num_running: int) -> list[ScheduledRow]:
        """The followers of a leader whose prompt this plan ends sample with it; those without room are queued."""
        rows: list[ScheduledRow] = []
        if leader.num_candidates:
            return rows  # beams fork when their search has chosen
        for follower in self._forks.followers_of(leader):
            num_begun = self._forks.num_begun
            has_room = num_begun < min(self._limits.max_num_seqs - num_running, self._blocks.num_available_blocks)
            if has_room and not leader.num_output_tokens:
                self._forks.begin(leader, follower)
                rows.append(ScheduledRow(follower, follower.attempt, 0, 1))
            else:
                self._forks.leave(follower)
                self._admitter.queue(follower)
        return rows


def _row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
    sequence.num_planned_tokens += num_tokens
    sequence.num_plans_in_flight += 1
    num_samples = int(sequence.num_planned_tokens == len(sequence.token_ids) + sequence.num_planned_samples)
    sequence.num_planned_samples += num_samples
    return ScheduledRow(sequence, sequence.attempt, num_tokens, num_samples)
