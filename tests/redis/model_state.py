"""What the model of an owner knows: sequences, what Redis must hold by script, and what outlives every owner."""

from collections import Counter
from dataclasses import dataclass, field

from scheduler.block_manager import PoolImage
from scheduler.sequence import SequenceStatus
from scheduler.store import SequenceRow, WorkerImage
from scheduler.swapper import Swap
from tests.redis.worker_model import BLOCK_SIZE, Story

Content = tuple[str, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class Tracked:
    """The owner's view of a sequence."""

    story: Story
    num_tokens: int
    attempt: int = 0
    is_finished: bool = False
    is_running: bool = False
    table: list[int] = field(default_factory=list)
    num_acked_blocks: int = 0
    num_computed: int = 0
    num_planned: int = 0
    num_planned_samples: int = 0
    num_published: int = 0
    num_arriving_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_in_flight: int = 0
    has_computed_record: bool = False

    @property
    def seq_id(self) -> int:
        """Its name."""
        return self.story.seq_id

    @property
    def request_id(self) -> str:
        """As pins ask for it."""
        return f"r{self.seq_id}"

    @property
    def pin_s(self) -> float:
        """As pins ask for it."""
        return 10.0 + self.seq_id % 40

    @property
    def status(self) -> SequenceStatus:
        """As the swapper asks for it."""
        return SequenceStatus.RUNNING if self.is_running else SequenceStatus.WAITING

    @property
    def block_ids(self) -> list[int]:
        """As the swapper asks for it."""
        return self.table

    @property
    def num_computed_tokens(self) -> int:
        """As the swapper asks for it."""
        return self.num_computed

    @property
    def num_outputs(self) -> int:
        """Output tokens known."""
        return self.num_tokens - len(self.story.prompt)

    @property
    def outputs(self) -> list[int]:
        """The output tokens known."""
        return [self.story.output(i) for i in range(self.num_outputs)]

    @property
    def num_plannable(self) -> int:
        """Tokens that a plan may run now: known, or to be known by then, and with an acknowledged block."""
        if not self.is_running or self.num_arriving_blocks:
            return 0
        num_known = self.num_tokens + self.num_planned_samples
        return min(num_known, self.num_acked_blocks * BLOCK_SIZE) - self.num_planned

    def row(self) -> SequenceRow:
        """What Redis is told of it."""
        return SequenceRow(self.request_id, 0, self.attempt, 0, 0, -1)


@dataclass(slots=True)
class Expected:
    """What Redis holds once a script is applied, and what its owner knows once that is acknowledged."""

    image: WorkerImage
    committed_step_id: int
    kept_logs: dict[int, tuple[list[int], bool]]
    """Logs without a row: (tokens, whether they expire)."""
    reserved: list[tuple[Tracked, int, int]] = field(default_factory=list)
    logged: list[tuple[int, int]] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)


@dataclass(slots=True)
class World:
    """What outlives every owner."""

    stories: dict[int, Story] = field(default_factory=dict)
    contents: dict[bytes, Content] = field(default_factory=dict)
    """block_hash -> what a block of that hash holds."""
    expected: dict[int, Expected] = field(default_factory=dict)
    """By script number: what Redis holds then."""
    delivered: dict[int, int] = field(default_factory=dict)
    """seq_id -> output tokens whose log was acknowledged: a client may have them."""
    events: Counter[str] = field(default_factory=Counter)


def num_tables(image: PoolImage, block_id: int) -> int:
    """Tables that name a block, and swaps: its references, but for those of running copies."""
    num_copies = sum(block_id in (copy, source) for copy, (source, _) in image.copies.items())
    return image.ref_counts.get(block_id, 0) - num_copies


def revived(story: Story, row: SequenceRow, image: WorkerImage) -> Tracked:
    """A sequence as Redis tells of it."""
    log = image.logs[story.seq_id]
    sequence = Tracked(story, len(story.prompt) + len(log), row.attempt)
    if story.seq_id in image.tables:
        computed = image.computed.get(story.seq_id)
        sequence.is_running = True
        sequence.table = list(image.tables[story.seq_id])
        sequence.num_acked_blocks = len(sequence.table)
        sequence.has_computed_record = computed is not None
        sequence.num_computed = sequence.num_tokens - 1 if computed is None else computed
        sequence.num_planned = sequence.num_computed
        sequence.num_published = sequence.num_computed // BLOCK_SIZE
    return sequence
