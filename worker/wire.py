"""The contract's messages as plain values, and back. The only reader of plans and builder of messages up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pagoda.v1 import worker_pb2 as pb

from worker.errors import ProtocolError
from worker.step import Candidates

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """How a sequence samples; see the contract."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    min_tokens: int
    end_token_ids: tuple[int, ...]
    num_candidates: int
    reports_logprobs: bool


@dataclass(frozen=True, slots=True)
class AddedSequence:
    """A sequence. token_ids: int32, from num_computed_tokens on; block_ids: its table, in order."""

    seq_id: int
    attempt: int
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: NDArray[np.int32]
    sampler: SamplerParams


@dataclass(frozen=True, slots=True)
class Plan:
    """One step plan, decoded: lists where the worker looks ids up, arrays where it calculates.

    copies: (src block, dst block, tokens) each. appended_* and scheduled columns are as in the contract.
    """

    epoch: int
    step_id: int
    committed_step_id: int
    removed_seq_ids: list[int]
    added: list[AddedSequence]
    appended_seq_ids: list[int]
    appended_num_blocks: NDArray[np.int64]
    appended_block_ids: NDArray[np.int32]
    copies: list[tuple[int, int, int]]
    scheduled_seq_ids: list[int]
    num_scheduled_tokens: NDArray[np.int64]
    freed_block_ids: list[int]
    replaced_seq_ids: list[int]
    replaced_token_ids: list[int]
    out_block_ids: NDArray[np.int64]
    out_host_block_ids: NDArray[np.int64]
    in_host_block_ids: NDArray[np.int64]
    in_block_ids: NDArray[np.int64]
    num_steps: int = 1

    @property
    def has_swaps(self) -> bool:
        """Whether blocks move between the pools."""
        return bool(len(self.out_block_ids) or len(self.in_block_ids))


@dataclass(frozen=True, slots=True)
class SwapReport:
    """Swaps of one plan that are done, by their destinations; seconds that they took."""

    epoch: int
    host_block_ids: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    seconds: float


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the steps of a plan did: one entry per scheduled sequence in each column, in the plan's order; seconds.

    token_logprobs: [num tokens] float32, as in the contract; None where no sequence asked.
    """

    epoch: int
    step_id: int
    seq_ids: list[int]
    attempts: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    first_output_indexes: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    failed_seq_ids: list[int]
    step_s: float
    gap_s: float
    back_to_back: bool
    candidates: "Sequence[Candidates]"
    token_logprobs: NDArray[np.float32] | None = None
    num_steps: int = 1


def decode_plan(message: pb.StepPlan) -> Plan:
    """Raises ProtocolError where columns that belong together differ in length."""
    plan = Plan(
        epoch=message.epoch,
        step_id=message.step_id,
        committed_step_id=message.committed_step_id,
        removed_seq_ids=list(message.removed_seq_ids),
        added=[_decode_added(added) for added in message.added],
        appended_seq_ids=list(message.appended_seq_ids),
        appended_num_blocks=_int64(message.appended_num_blocks),
        appended_block_ids=_int32(message.appended_block_ids),
        copies=list(zip(message.copy_src_block_ids, message.copy_dst_block_ids, message.copy_num_tokens, strict=False)),
        scheduled_seq_ids=list(message.scheduled_seq_ids),
        num_scheduled_tokens=_int64(message.num_scheduled_tokens),
        freed_block_ids=list(message.freed_block_ids),
        replaced_seq_ids=list(message.replaced_seq_ids),
        replaced_token_ids=list(message.replaced_token_ids),
        out_block_ids=_int64(message.out_block_ids),
        out_host_block_ids=_int64(message.out_host_block_ids),
        in_host_block_ids=_int64(message.in_host_block_ids),
        in_block_ids=_int64(message.in_block_ids),
        num_steps=max(1, message.num_steps),
    )
    _require(len(plan.scheduled_seq_ids) == len(plan.num_scheduled_tokens), plan, "scheduled")
    _require(len(plan.appended_seq_ids) == len(plan.appended_num_blocks), plan, "appended")
    _require(int(plan.appended_num_blocks.sum()) == len(plan.appended_block_ids), plan, "appended_block_ids")
    _require(len(plan.replaced_seq_ids) == len(plan.replaced_token_ids), plan, "replaced")
    _require(len(plan.out_block_ids) == len(plan.out_host_block_ids), plan, "out")
    _require(len(plan.in_block_ids) == len(plan.in_host_block_ids), plan, "in")
    lengths = {len(message.copy_src_block_ids), len(message.copy_dst_block_ids), len(message.copy_num_tokens)}
    _require(len(lengths) == 1, plan, "copy")
    return plan


def encode_result(output: StepOutput) -> pb.ConnectRequest:
    """The message up for a step that was run."""
    request = pb.ConnectRequest()
    result = request.result
    result.epoch = output.epoch
    result.step_id = output.step_id
    result.seq_ids.extend(output.seq_ids)
    result.attempts.extend(output.attempts.tolist())
    result.num_computed_tokens.extend(output.num_computed_tokens.tolist())
    result.first_output_indexes.extend(output.first_output_indexes.tolist())
    result.num_tokens.extend(output.num_tokens.tolist())
    result.token_ids.extend(output.token_ids.tolist())
    result.failed_seq_ids.extend(output.failed_seq_ids)
    result.step_s = output.step_s
    result.gap_s = output.gap_s
    result.back_to_back = output.back_to_back
    for candidates in output.candidates:
        result.candidate_token_ids.extend(candidates.token_ids)
        result.candidate_logprobs.extend(candidates.logprobs)
    if output.token_logprobs is not None:
        result.token_logprobs.extend(output.token_logprobs.tolist())
    return request


def encode_swaps(report: SwapReport) -> pb.ConnectRequest:
    """The message up for swaps that are done."""
    return pb.ConnectRequest(
        swaps_done=pb.SwapsDone(
            epoch=report.epoch,
            host_block_ids=report.host_block_ids.tolist(),
            block_ids=report.block_ids.tolist(),
            seconds=report.seconds,
        )
    )


def _decode_added(added: pb.AddedSequence) -> AddedSequence:
    if len(added.num_blocks) > 1 or sum(added.num_blocks) != len(added.block_ids):
        raise ProtocolError(
            f"added sequence {added.seq_id} has {len(added.block_ids)} blocks in groups of {list(added.num_blocks)}: "
            "this worker has one KV group"
        )
    sampler = added.sampler
    return AddedSequence(
        seq_id=added.seq_id,
        attempt=added.attempt,
        token_ids=_int32(added.token_ids),
        num_prompt_tokens=added.num_prompt_tokens,
        num_computed_tokens=added.num_computed_tokens,
        block_ids=_int32(added.block_ids),
        sampler=SamplerParams(
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            min_p=sampler.min_p,
            seed=sampler.seed,
            min_tokens=sampler.min_tokens,
            end_token_ids=tuple(sampler.end_token_ids),
            num_candidates=sampler.num_candidates,
            reports_logprobs=sampler.reports_logprobs,
        ),
    )


def _require(holds: bool, plan: Plan, columns: str) -> None:
    if not holds:
        raise ProtocolError(f"plan {plan.step_id}: {columns} columns differ in length")


def _int64(column: "Sequence[int]") -> NDArray[np.int64]:
    return np.fromiter(column, np.int64, len(column))


def _int32(column: "Sequence[int]") -> NDArray[np.int32]:
    return np.fromiter(column, np.int32, len(column))
