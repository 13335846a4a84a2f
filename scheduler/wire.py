"""The only builder of plans, and the only reader of results. Columns, changes only; decides nothing."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

from pagoda.v1 import worker_pb2 as pb

from scheduler.block_manager import BlockCopy
from scheduler.request import SamplingParams
from scheduler.sequence import Sequence
from scheduler.step_rows import ScheduledRow
from scheduler.swapper import Swap

_SEED = Struct("<QI")
_SEED_BYTES = 8


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What orders a plan among all others of its worker."""

    epoch: int
    step_id: int
    committed_step_id: int


@dataclass(frozen=True, slots=True)
class ResultRow:
    """What a step did for one sequence, for results that are matched by themselves and not by their plan."""

    seq_id: int
    attempt: int
    num_computed_tokens: int
    first_output_index: int
    token_ids: list[int]
    logprobs: list[float]
    """Of each token; empty where no sequence of the step asked."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a plan does: what it runs, what it copies before, whom it forgets before that; what it begins to swap."""

    rows: Seq[ScheduledRow]
    copies: Seq[BlockCopy] = ()
    removed: Seq[int] = ()
    swaps: Seq[Swap] = ()
    num_steps: int = 1
    """Over which its rows' tokens are spread, one of each row in a step, where it is more than one."""


def build_plan(numbers: StepNumbers, work: StepWork, samplers: dict[int, pb.SamplerParams]) -> pb.StepPlan:
    """The plan that does `work`; notes in each sequence what its worker knows from now on.

    `samplers` holds the parameters of every sequence that may have to be added.
    """
    plan = pb.StepPlan(
        epoch=numbers.epoch,
        step_id=numbers.step_id,
        committed_step_id=numbers.committed_step_id,
        removed_seq_ids=work.removed,
        copy_src_block_ids=[copy.source for copy in work.copies],
        copy_dst_block_ids=[copy.destination for copy in work.copies],
        copy_num_tokens=[copy.num_tokens for copy in work.copies],
        out_block_ids=[swap.block_id for swap in work.swaps if swap.is_out],
        out_host_block_ids=[swap.host_block_id for swap in work.swaps if swap.is_out],
        in_host_block_ids=[swap.host_block_id for swap in work.swaps if not swap.is_out],
        in_block_ids=[swap.block_id for swap in work.swaps if not swap.is_out],
        scheduled_seq_ids=[row.sequence.seq_id for row in work.rows],
        num_scheduled_tokens=[row.num_tokens for row in work.rows],
        num_steps=work.num_steps,
    )
    for row in work.rows:
        sequence = row.sequence
        if sequence.num_candidates and sequence.is_on_worker and sequence.num_output_tokens:
            plan.replaced_seq_ids.append(sequence.seq_id)
            plan.replaced_token_ids.append(sequence.token_ids[-1])
        if sequence.num_sent_blocks == sequence.num_acked_blocks and sequence.is_on_worker:
            continue
        if not sequence.is_on_worker:
            plan.added.append(_added(row, samplers[sequence.seq_id]))
            sequence.is_on_worker = True
        else:
            fresh = sequence.block_ids[sequence.num_sent_blocks : sequence.num_acked_blocks]
            plan.appended_seq_ids.append(sequence.seq_id)
            plan.appended_num_blocks.append(len(fresh))
            plan.appended_block_ids.extend(fresh)
        sequence.num_sent_blocks = sequence.num_acked_blocks
    return plan


def _added(row: ScheduledRow, sampler: pb.SamplerParams) -> pb.AddedSequence:
    sequence = row.sequence
    num_computed = sequence.num_planned_tokens - row.num_tokens
    blocks = sequence.block_ids[: sequence.num_acked_blocks]
    return pb.AddedSequence(
        seq_id=sequence.seq_id,
        attempt=sequence.attempt,
        token_ids=sequence.token_ids[num_computed:],
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=num_computed,
        block_ids=blocks,
        num_blocks=[len(blocks)],
        sampler=sampler,
    )


def sampler_params(sequence: Sequence, sampling: SamplingParams) -> pb.SamplerParams:
    """The worker's share of a request's parameters. Ids that may not end it early are masked until min_tokens."""
    return pb.SamplerParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=choice_seed(sampling.seed, sequence.choice),
        min_tokens=sampling.min_tokens,
        end_token_ids=sorted(sequence.limits.end_token_ids),
        num_candidates=sequence.num_candidates,
        reports_logprobs=sequence.logprobs is not None,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice, 64 bits: the request's own for choice 0.

    Hashed: streams of random numbers whose seeds differ by a simple sum may be one another's, moved on by some places.
    """
    if choice == 0:
        return seed
    return int.from_bytes(blake2b(_SEED.pack(seed, choice), digest_size=_SEED_BYTES).digest(), "little")


def result_rows(result: pb.StepResult) -> list[ResultRow]:
    """A result taken by itself."""
    rows: list[ResultRow] = []
    at = 0
    columns = (
        result.seq_ids,
        result.attempts,
        result.num_computed_tokens,
        result.first_output_indexes,
        result.num_tokens,
    )
    for seq_id, attempt, num_computed, first, count in zip(*columns, strict=True):
        tokens, logprobs = result.token_ids[at : at + count], result.token_logprobs[at : at + count]
        rows.append(ResultRow(seq_id, attempt, num_computed, first, list(tokens), list(logprobs)))
        at += count
    return rows
