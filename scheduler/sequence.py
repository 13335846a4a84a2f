"""One sequence: its tokens, its blocks, and how far each of planner, worker and Redis has come with it.

Does no I/O and decides nothing; the planner and the engine move it.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """What ends a sequence, as far as token ids tell."""

    max_output_tokens: int
    end_token_ids: frozenset[int]
    ignores_eos: bool


class BlockSource(IntEnum):
    """Where a block of an admitted prompt came from; values as in the contract."""

    HIT = 1
    COMPUTED = 2
    EVICTED = 3
    """Computed again: it was cached, and evicted."""
    LAST = 4
    """Computed whatever is cached: it holds the last token, which is always run."""
    HOST_HIT = 5
    """Copied from the host pool."""


@dataclass(frozen=True, slots=True)
class EvictedRun:
    """Blocks of a prompt, side by side, that were evicted at once."""

    first_block: int
    num_blocks: int
    eviction: tuple[float, str]
    """(Unix time, id of the request that they made room for)."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Where the blocks of a prompt came from when its sequence was admitted."""

    worker: str
    at_s: float
    """Unix time."""
    attempt: int
    sources: bytes
    """A BlockSource per block of the prompt."""
    evicted: tuple[EvictedRun, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's view of one choice of one request.

    Order of progress, in tokens: num_computed_tokens (the worker has reported it) <= num_planned_tokens (some plan
    covers it) <= len(token_ids) + num_planned_samples.
    """

    seq_id: int
    request_id: str
    choice: int
    token_ids: list[int]
    num_prompt_tokens: int
    limits: SequenceLimits
    root_hash: bytes
    priority: int = 0
    tenant: str = ""
    pin_s: float = 0.0
    """Seconds for which its prompt's full blocks are to be kept once they are computed."""
    num_candidates: int = 0
    """Of a beam: likeliest tokens of which the scheduler chooses, before anything more of it can be planned."""
    awaits_choice: bool = False
    """Of a beam: it has reported its candidates, and others of its search have not."""
    logprobs: list[float] | None = None
    """Of a choice that is to be ranked: the log probability of each of its output tokens."""

    status: SequenceStatus = SequenceStatus.WAITING
    leader: "Sequence | None" = None
    """Whose prompt, the same as this one's, it waits for, to fork from it."""
    attempt: int = 0
    num_losses: int = 0
    num_preemptions: int = 0
    segment_first_index: int = 0
    """Output index at which the log under the present worker's tag begins."""

    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Of all full blocks of token_ids that were hashed so far, published or not."""
    num_published_blocks: int = 0
    """Blocks from the front that are shared, published, or known to be some other block's duplicate."""
    num_shared_blocks: int = 0
    """Blocks from the front that were found in the prefix index at admission, or shared in a fork."""
    num_acked_blocks: int = 0
    """Blocks whose reservation Redis has acknowledged: only these may be named in a plan."""
    num_sent_blocks: int = 0
    """Blocks that the worker has been told of."""

    num_arriving_blocks: int = 0
    """Blocks that are being copied from the host; it does not run before they are there."""

    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix index at the first admission; all of them where it was forked."""
    num_computed_tokens: int = 0
    num_planned_tokens: int = 0
    num_planned_samples: int = 0
    """Tokens that plans in flight will sample."""
    num_plans_in_flight: int = 0
    """Plans in flight that name it, of any attempt."""
    num_logged_tokens: int = 0
    """Output tokens that Redis has acknowledged: only these may reach the client."""
    has_computed_record: bool = False
    """Whether Redis holds num_computed_tokens for it; it holds none for a sequence that has caught up."""
    is_on_worker: bool = False
    """Whether the worker's batch has it, in this attempt."""
    admissions: list[Admission] = field(default_factory=list)
    """Where its prompt's blocks came from, for `pagoda explain`: the first admission and the last ones."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_num_tokens(self) -> int:
        """Most tokens that it will ever hold in blocks: the last one sampled is never run."""
        return self.num_prompt_tokens + self.limits.max_output_tokens - 1

    @property
    def num_unsampled_tokens(self) -> int:
        """Most output tokens that are still to come, beside those that plans in flight will sample."""
        return self.limits.max_output_tokens - self.num_output_tokens - self.num_planned_samples

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens known, or to be known by then, that no plan covers yet; 0 where the end is planned."""
        num_tokens = len(self.token_ids)
        if not self.num_candidates:
            num_tokens += self.num_planned_samples
        if num_tokens - self.num_prompt_tokens >= self.limits.max_output_tokens:
            return 0
        return num_tokens - self.num_planned_tokens

    def num_blocks_short(self, num_steps: int, block_size: int) -> int:
        """Blocks that it lacks for what may be planned of it within so many steps more."""
        num_tokens, num_blocks = self.num_planned_tokens + 1 + num_steps, len(self.block_ids)
        if num_tokens <= num_blocks * block_size:
            return 0
        return max(0, -(-min(num_tokens, self.max_num_tokens) // block_size) - num_blocks)

    def forget_progress(self) -> None:
        """Back to nothing computed, in a new attempt; tokens and the border between prompt and output stay."""
        self.attempt += 1
        self.block_ids = []
        self.num_published_blocks = 0
        self.num_shared_blocks = 0
        self.num_acked_blocks = 0
        self.num_sent_blocks = 0
        self.num_arriving_blocks = 0
        self.num_computed_tokens = 0
        self.num_planned_tokens = 0
        self.num_planned_samples = 0
        self.is_on_worker = False
