"""A worker as the scheduler's rules see it: a physical pool in which every slot says what is written in it.

The KV of a token depends on everything before it, so a slot holds (salt, all tokens up to and with its own). Whatever
is read and is not exactly that was never written, or was overwritten.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.swapper import Swap

BLOCK_SIZE = 4

Slot = tuple[str, tuple[int, ...]] | None


@dataclass(frozen=True, slots=True)
class Story:
    """What a sequence is and, sampling being reproducible, all that it will ever say."""

    seq_id: int
    salt: str
    prompt: tuple[int, ...]

    def output(self, index: int) -> int:
        """The output token at an index."""
        return (self.seq_id + index) % 3

    def tokens(self, num_tokens: int) -> tuple[int, ...]:
        """The first tokens, prompt and output."""
        outputs = range(num_tokens - len(self.prompt))
        return self.prompt[:num_tokens] + tuple(self.output(i) for i in outputs)

    def slot(self, position: int) -> Slot:
        """What the pool holds once the token at this position has run."""
        return (self.salt, self.tokens(position + 1))


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part in a plan."""

    story: Story
    attempt: int
    block_ids: tuple[int, ...]
    first_position: int
    num_tokens: int
    samples: bool

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is written once it has run."""
        return self.first_position + self.num_tokens

    @property
    def first_output_index(self) -> int:
        """Where its sampled token belongs."""
        return self.num_computed - len(self.story.prompt)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: copies first, then rows."""

    step_id: int
    epoch: int
    copies: tuple[tuple[int, int, int], ...]
    """(destination, source, tokens)."""
    rows: tuple[Row, ...]
    swaps: tuple[Swap, ...]
    """To begin as soon as all plans before this one are done."""


@dataclass(slots=True)
class Worker:
    """Runs plans in order and keeps their results, as one incarnation."""

    incarnation: str
    num_blocks: int
    num_host_blocks: int
    plans: deque[Plan] = field(default_factory=deque)
    swaps: deque[tuple[int, Swap]] = field(default_factory=deque)
    """Under way, in order, with the epoch of their plan."""
    done: list[Plan] = field(default_factory=list)
    """Every plan that ran: its results, for whoever asks again."""
    pool: dict[int, list[Slot]] = field(default_factory=dict)
    host: dict[int, list[Slot]] = field(default_factory=dict)
    _begun_step_id: int = 0

    def __post_init__(self) -> None:
        self.host = {block_id: [None] * BLOCK_SIZE for block_id in range(1, self.num_host_blocks + 1)}
        self.pool = {block_id: [None] * BLOCK_SIZE for block_id in range(1, self.num_blocks + 1)}

    @property
    def highest_step_id(self) -> int:
        """Highest step that was run."""
        return self.done[-1].step_id if self.done else 0

    def run(self, is_readonly: Callable[[int], bool]) -> Plan:
        """Runs the oldest plan; asserts that it reads only what is written, and writes only where it may."""
        self.begin_swaps()
        plan = self.plans.popleft()
        for destination, source, num_tokens in plan.copies:
            assert None not in self.pool[source][:num_tokens], f"copy of unwritten slots of block {source}"
            self.pool[destination][:num_tokens] = self.pool[source][:num_tokens]
        for row in plan.rows:
            for position in range(row.first_position):
                self._read(row, position)
            for position in range(row.first_position, row.num_computed):
                block_id = row.block_ids[position // BLOCK_SIZE]
                assert not is_readonly(block_id), f"write to block {block_id}, which is published"
                self.pool[block_id][position % BLOCK_SIZE] = row.story.slot(position)
        self.done.append(plan)
        return plan

    def begin_swaps(self) -> None:
        """Those of the plan whose turn it is."""
        if self.plans and self.plans[0].step_id > self._begun_step_id:
            self._begun_step_id = self.plans[0].step_id
            self.swaps += [(self.plans[0].epoch, swap) for swap in self.plans[0].swaps]

    def swap(self) -> tuple[int, Swap]:
        """Does the oldest swap that is under way."""
        epoch, swap = self.swaps.popleft()
        if swap.is_out:
            assert None not in self.pool[swap.block_id], f"unwritten slots of block {swap.block_id} go out"
            self.host[swap.host_block_id] = list(self.pool[swap.block_id])
        else:
            self.pool[swap.block_id] = list(self.host[swap.host_block_id])
        return epoch, swap

    def _read(self, row: Row, position: int) -> None:
        held = self.pool[row.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE]
        assert held == row.story.slot(position), f"sequence {row.story.seq_id} reads {held} at {position}"

    def holds(self, block_id: int, salt: str, tokens: tuple[int, ...]) -> bool:
        """Whether a block holds the last full block of these tokens."""
        return self.pool[block_id] == _content(salt, tokens)

    def holds_on_host(self, host_block_id: int, salt: str, tokens: tuple[int, ...]) -> bool:
        """Whether a host block does."""
        return self.host[host_block_id] == _content(salt, tokens)


def _content(salt: str, tokens: tuple[int, ...]) -> list[Slot]:
    first = len(tokens) - BLOCK_SIZE
    return [(salt, tokens[: first + i + 1]) for i in range(BLOCK_SIZE)]
