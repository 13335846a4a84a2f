"""Memory that requests save by sharing blocks: the real planner over the real batch.

Users of one prompt are measured at the last step at which most of them hold memory; choices and beams as Kwon et al.
(SOSP 2023, figure 15) do: blocks saved over blocks that there would be without sharing, on average over the steps.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from scheduler.admitter import PlannerLimits
from tests.load.memory.accounting import saved_by_sharing
from tests.load.memory.contenders import paged
from tests.load.memory.drive import Drive, Request, local_worker
from tests.load.memory.traces import MAX_MODEL_LEN, SPECS, read_trace

BLOCK_SIZE = 16
NUM_BLOCKS = 8192
VOCAB_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Saving:
    """Of one case: most tokens that its sequences could read and that were stored, share of blocks saved."""

    name: str
    num_read: int
    num_stored: int
    saved: float


def shared_prompt(num_users: int, num_prompt_tokens: int, num_output_tokens: int = 16) -> Saving:
    """Users who begin with the same prompt and go on by themselves."""
    limits = PlannerLimits(BLOCK_SIZE, max_num_seqs=num_users, max_num_batched_tokens=2048, overcommit=1.0)
    num_blocks = (num_prompt_tokens + num_users * (num_output_tokens + 2 * BLOCK_SIZE)) // BLOCK_SIZE
    flags = {"timed-step-s": 0, "num-blocks": num_blocks, "max-num-seqs": num_users, "max-num-batched-tokens": 2048}
    contender = paged(limits, num_blocks)
    prompt = [1 + i % 1000 for i in range(num_prompt_tokens)]
    requests = [Request(prompt, num_output_tokens, num_output_tokens)] * num_users
    best, most = Saving("", 0, 0, 0.0), 1
    for _ in Drive(contender, local_worker(flags), requests):
        running = contender.planner.running
        if len(running) >= most:
            most = len(running)
            best = Saving(
                name=f"{most} users with one prompt of {num_prompt_tokens} tokens",
                num_read=sum(sequence.num_computed_tokens for sequence in running),
                num_stored=int(contender.use({}).tokens),
                saved=saved_by_sharing(sequence.block_ids for sequence in running),
            )
    return best


def shared_by_request(trace_name: str, request: Request, model: Path | None, num_requests: int) -> Saving:
    """Requests of a trace's lengths, each with choices or beams as `request` says; an average over all steps.

    Prompts are random. Choices cost no model; beams branch as `model`, which runs, makes them.
    """
    limits = PlannerLimits(BLOCK_SIZE, max_num_seqs=256, max_num_batched_tokens=2048, overcommit=1.0)
    flags = {"num-blocks": NUM_BLOCKS, "max-num-seqs": 256, "max-num-batched-tokens": 2048}
    flags |= {"timed-step-s": 0} if model is None else {"model": model, "max-model-len": MAX_MODEL_LEN}
    rng = random.Random(0)
    requests = [
        replace(
            request,
            prompt=[rng.randrange(1, VOCAB_SIZE) for _ in range(lengths.num_prompt_tokens)],
            num_output_tokens=lengths.num_output_tokens,
            limit=lengths.num_output_tokens,
        )
        for lengths in read_trace(trace_name)[:num_requests]
    ]
    contender = paged(limits, NUM_BLOCKS)
    num_named = num_held = num_read = num_stored = 0
    for _ in Drive(contender, local_worker(flags), requests):
        tables = [sequence.block_ids for sequence in contender.planner.running]
        num_named += sum(map(len, tables))
        num_held += len({block_id for table in tables for block_id in table})
        num_read = max(num_read, sum(sequence.num_computed_tokens for sequence in contender.planner.running))
        num_stored = max(num_stored, int(contender.use({}).tokens))
    what = f"{request.beam_width} beams" if request.beam_width else f"{request.n} choices"
    return Saving(f"{trace_name}, {what}", num_read, num_stored, 1 - num_held / num_named)


def cases(model: Path) -> Iterator[Saving]:
    """All of them, one after the other."""
    yield shared_prompt(num_users=100, num_prompt_tokens=5000)
    for trace_name in SPECS:
        for n in (2, 4, 6):
            yield shared_by_request(trace_name, Request([], 0, 0, n=n), None, 100)
        for beam_width in (2, 4, 6):
            yield shared_by_request(trace_name, Request([], 0, 0, beam_width=beam_width), model, 24)
