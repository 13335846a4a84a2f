"""What a whole run amounts to: slot-seconds, seconds, tokens, requests held. Sums and maxima, so that runs add up."""

from dataclasses import dataclass, field
from typing import Any

from tests.load.memory.accounting import MemoryUse
from tests.load.memory.drive import Moment


@dataclass(slots=True)
class Outcome:
    """Of one run or several."""

    seconds: float = 0.0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    held_s: float = 0.0
    """Request-seconds that requests held memory."""
    max_num_held: int = 0
    max_num_rows: int = 0
    """Sequences in the largest step."""
    use: MemoryUse = field(default_factory=MemoryUse)
    """In slot-seconds."""
    use_when_waited_for: MemoryUse = field(default_factory=MemoryUse)
    """The same, of the steps while which a request waited for memory."""

    def add(self, moment: Moment) -> None:
        """One more step."""
        use = moment.use.during(moment.seconds)
        self.seconds += moment.seconds
        self.num_output_tokens += moment.num_output_tokens
        self.num_steps += 1
        self.held_s += moment.num_held * moment.seconds
        self.max_num_held = max(self.max_num_held, moment.num_held)
        self.max_num_rows = max(self.max_num_rows, moment.num_rows)
        self.use += use
        if moment.is_waited_for:
            self.use_when_waited_for += use

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Outcome":
        """What `dataclasses.asdict` made of one."""
        uses = {name: MemoryUse(**found[name]) for name in ("use", "use_when_waited_for")}
        return cls(**(found | uses))

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            seconds=self.seconds + other.seconds,
            num_output_tokens=self.num_output_tokens + other.num_output_tokens,
            num_steps=self.num_steps + other.num_steps,
            num_preemptions=self.num_preemptions + other.num_preemptions,
            held_s=self.held_s + other.held_s,
            max_num_held=max(self.max_num_held, other.max_num_held),
            max_num_rows=max(self.max_num_rows, other.max_num_rows),
            use=self.use + other.use,
            use_when_waited_for=self.use_when_waited_for + other.use_when_waited_for,
        )

    @property
    def tokens_per_s(self) -> float:
        """Output tokens."""
        return self.num_output_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Output tokens, on average: what throughput would follow if steps took the same time whatever they run."""
        return self.num_output_tokens / self.num_steps

    @property
    def mean_num_held(self) -> float:
        """Requests that hold memory, over time."""
        return self.held_s / self.seconds

    @property
    def step_s(self) -> float:
        """Of a step, on average."""
        return self.seconds / self.num_steps
