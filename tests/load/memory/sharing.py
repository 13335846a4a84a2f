"""Memory that requests save by sharing blocks: the real planner over the real batch, steps that compute nothing.

Each case is measured at the last step at which most of its sequences hold memory. A new kind of sharing is a new entry
in CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.planner import PlannerLimits
from tests.load.memory.accounting import saved_by_sharing
from tests.load.memory.contenders import paged
from tests.load.memory.drive import Drive, Request, local_worker

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Saving:
    """Of one case: tokens that its sequences can read, tokens that are stored for it, share of blocks saved."""

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


CASES: tuple[Callable[[], Saving], ...] = (lambda: shared_prompt(num_users=100, num_prompt_tokens=5000),)
