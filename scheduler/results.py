"""Applies what steps did to the sequences: progress, new tokens, ends. In order, each result once. Does no I/O."""

from dataclasses import dataclass
from itertools import islice

from pagoda.v1 import worker_pb2 as pb

from scheduler.committer import Committer
from scheduler.live_request import Ending, LiveChoice, LiveRequest
from scheduler.planner import Planner
from scheduler.sequence import FinishReason, Sequence, SequenceStatus
from scheduler.step_rows import ScheduledRow
from scheduler.wire import result_rows

NOT_FINITE = Ending(FinishReason.ERROR, "INTERNAL", "the model's logits are not finite")


class ProtocolError(Exception):
    """The worker did what the contract forbids; it is lost."""


@dataclass(frozen=True, slots=True)
class Step:
    """A plan in flight. num_tokens: of all its steps. copied_block_ids: destinations of its copies."""

    step_id: int
    rows: list[ScheduledRow]
    num_tokens: int
    copied_block_ids: list[int]
    num_steps: int = 1


class Results:
    """Of one engine. `live` maps seq_id to the choice, and is the engine's."""

    def __init__(self, planner: Planner, committer: Committer, live: dict[int, LiveChoice]) -> None:
        self._planner = planner
        self._committer = committer
        self._live = live
        self.num_output_tokens = 0

    def apply(self, step: Step, result: pb.StepResult) -> None:
        """A result of a plan of ours, whose rows it follows. Raises ProtocolError where it does not."""
        _check_shape(result, len(step.rows))
        if step.copied_block_ids:
            self._planner.blocks.finish_copies(step.copied_block_ids)
        token_ids, logprobs = list(result.token_ids), list(result.token_logprobs)
        candidates = zip(result.candidate_token_ids, result.candidate_logprobs, strict=False)
        failed = set(result.failed_seq_ids)
        at = 0
        columns = (result.num_computed_tokens, result.first_output_indexes, result.num_tokens)
        for row, num_computed, first_index, count in zip(step.rows, *map(list, columns), strict=True):
            sequence = row.sequence
            tokens, own_logprobs = token_ids[at : at + count], logprobs[at : at + count]
            at += count
            likeliest = list(islice(candidates, sequence.num_candidates)) if count and sequence.num_candidates else []
            sequence.num_plans_in_flight -= 1
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.attempt == row.attempt:
                self._advance(row, num_computed)
            if tokens:
                if not row.num_samples:
                    raise ProtocolError(f"tokens of a sequence whose prompt is not done in step {step.step_id}")
                if not sequence.num_candidates:
                    self._append(sequence, first_index, tokens, own_logprobs)
                elif sequence.attempt == row.attempt:
                    self._consider(sequence, likeliest)
            if failed and sequence.seq_id in failed and sequence.status is not SequenceStatus.FINISHED:
                self.finish(self._live[sequence.seq_id], NOT_FINITE)

    def apply_resent(self, result: pb.StepResult) -> None:
        """A result of a step that an earlier owner planned: matched by sequence, attempt and index."""
        _check_shape(result, len(result.seq_ids))
        failed = set(result.failed_seq_ids)
        for row in result_rows(result):
            choice = self._live.get(row.seq_id)
            if choice is None or choice.sequence.status is SequenceStatus.FINISHED:
                continue
            sequence = choice.sequence
            if sequence.num_candidates and row.token_ids:
                continue  # it is run once more: the search needs all candidates of a step
            if row.seq_id in failed:
                self.finish(choice, NOT_FINITE)
                continue
            if sequence.attempt == row.attempt and row.num_computed_tokens > sequence.num_computed_tokens:
                sequence.num_computed_tokens = sequence.num_planned_tokens = row.num_computed_tokens
                self._committer.note_computed(sequence, has_caught_up=bool(row.token_ids))
            num_known = max(0, sequence.num_output_tokens - row.first_output_index)
            fresh = row.token_ids[num_known:]
            if fresh:
                self._append(sequence, sequence.num_output_tokens, fresh, row.logprobs[num_known:])
            elif sequence.status is SequenceStatus.RUNNING:
                self._planner.publish_computed(sequence)

    def finish(self, choice: LiveChoice, ending: Ending) -> None:
        """A choice is over: its blocks are free at once, its end is recorded behind its last tokens.

        An error ends the whole request.
        """
        self._planner.finish(choice.sequence)
        if ending.reason is FinishReason.STOP:
            self._planner.lengths.add(choice.sequence.num_output_tokens)
        choice.ending = ending
        self._committer.end(choice)
        if ending.reason is FinishReason.ERROR:
            for other in choice.request.choices:
                if other.sequence.status is not SequenceStatus.FINISHED:
                    self.finish(other, ending)

    def _advance(self, row: ScheduledRow, num_computed: int) -> None:
        """Confirmed progress of the present attempt; what the worker ran less than planned is planned again."""
        sequence, num_planned = row.sequence, row.num_tokens
        sequence.num_planned_samples -= row.num_samples
        shortfall = num_planned - (num_computed - sequence.num_computed_tokens)
        if not 0 <= shortfall <= num_planned:
            raise ProtocolError(f"{num_computed} tokens computed, of {sequence.num_planned_tokens} planned")
        if shortfall:
            sequence.num_planned_tokens -= shortfall
        sequence.num_computed_tokens = num_computed
        if not row.num_samples:
            self._committer.note_computed(sequence, has_caught_up=False)
            self._planner.publish_computed(sequence)
        elif sequence.has_computed_record:
            self._committer.note_computed(sequence, has_caught_up=True)

    def _consider(self, sequence: Sequence, likeliest: list[tuple[int, float]]) -> None:
        """Candidates of a beam; those of the last one let the search take its next step. Raises ProtocolError."""
        if len(likeliest) != sequence.num_candidates:
            raise ProtocolError(f"{len(likeliest)} candidates of a beam that needs {sequence.num_candidates}")
        self._planner.publish_computed(sequence)
        live = self._live[sequence.seq_id].request
        live.candidates[sequence.choice] = likeliest
        sequence.awaits_choice = True
        search = live.search
        assert search is not None
        if len(live.candidates) < len(search.open_slots):
            return
        step = search.choose(live.candidates)
        search.apply(step)
        live.candidates.clear()
        self.num_output_tokens += len(step.running)
        self._committer.log_search(live, step.words())
        if search.is_done:
            self._conclude(live)
            return
        sequences = [choice.sequence for choice in live.choices]
        for beam in sequences:
            beam.awaits_choice = False
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        for slot, entry in enumerate(step.running):
            if entry.parent == slot:
                sequences[slot].token_ids.append(entry.token_id)
            else:
                token_ids = [*prompt, *search.beams[slot].token_ids]
                self._planner.branch(sequences[entry.parent], sequences[slot], token_ids)

    def _conclude(self, live: LiveRequest) -> None:
        """The search is over: what it found is what the choices said."""
        for choice in live.take_hypotheses():
            self._committer.deliver(choice)
        for choice in live.choices:
            self.finish(choice, Ending(hypothesis_reason(choice)))

    def _append(self, sequence: Sequence, first_index: int, tokens: list[int], logprobs: list[float]) -> None:
        """Logs new tokens, as far as the sequence's end lets them survive."""
        choice = self._live[sequence.seq_id]
        num_outputs = len(sequence.token_ids) - sequence.num_prompt_tokens
        if first_index != num_outputs:
            raise ProtocolError(f"tokens from {first_index} for a sequence that has {num_outputs}")
        reason: FinishReason | None = None
        for token in tokens:
            sequence.token_ids.append(token)
            num_outputs += 1
            reason = stop_reason(choice, token, num_outputs)
            if reason is not None:
                tokens = tokens[: num_outputs - first_index]
                break
        self.num_output_tokens += len(tokens)
        if sequence.logprobs is not None:
            if len(logprobs) < len(tokens):
                raise ProtocolError(f"no log probabilities of sequence {sequence.seq_id}, which needs them")
            sequence.logprobs += logprobs[: len(tokens)]
        self._committer.log_tokens(choice, first_index, tokens)
        self._planner.publish_computed(sequence)
        if reason is not None:
            self.finish(choice, Ending(reason))


def _check_shape(result: pb.StepResult, num_rows: int) -> None:
    """Raises ProtocolError where the columns do not belong together."""
    columns = (result.seq_ids, result.num_computed_tokens, result.first_output_indexes, result.num_tokens)
    lengths = [len(column) for column in columns]
    if lengths != [num_rows] * len(columns):
        raise ProtocolError(f"result of step {result.step_id} has columns of {lengths}, not {num_rows} rows")
    if sum(result.num_tokens) != len(result.token_ids):
        raise ProtocolError(
            f"result of step {result.step_id} has {len(result.token_ids)} tokens, not what its rows say"
        )
    if len(result.token_logprobs) not in (0, len(result.token_ids)):
        raise ProtocolError(f"result of step {result.step_id} has log probabilities of some of its tokens only")


def hypothesis_reason(choice: LiveChoice) -> FinishReason:
    """Why a hypothesis ended."""
    sequence = choice.sequence
    return FinishReason.STOP if sequence.token_ids[-1] in sequence.limits.end_token_ids else FinishReason.LENGTH


def stop_reason(choice: LiveChoice, token: int, num_output_tokens: int) -> FinishReason | None:
    """Whether the token that was just appended, the last of so many, ends the sequence, and why."""
    limits = choice.sequence.limits
    if token in limits.end_token_ids:
        return FinishReason.STOP
    if choice.stop_text is not None:
        choice.stop_text.push((token,))
        choice.stop_text.take()
        if choice.stop_text.stopped:
            return FinishReason.STOP
    if num_output_tokens >= limits.max_output_tokens:
        return FinishReason.LENGTH
    return None
