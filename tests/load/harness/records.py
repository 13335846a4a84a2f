"""What a generator writes down of each request: raw times, from which every figure is made afterwards.

Times are of the monotonic clock, which all processes of a machine share: the records of several are one list.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """How a request went."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    """We cancelled it, and the server ended it for that."""
    DISCONNECTED = "disconnected"
    """We left in mid-stream."""
    FAILED = "failed"
    """It ended with an error, or otherwise than it should."""


@dataclass(slots=True)
class Record:
    """One request. Times in seconds."""

    index: int
    """Of its conversation."""
    turn: int
    due_s: float
    """When it should have been sent: every latency counts from here."""
    sent_s: float = 0.0
    end_s: float = 0.0
    is_paced: bool = False
    """Whether its due time came from the schedule and nothing but the generator could hold it up."""
    outcome: Outcome = Outcome.FAILED
    status: str = ""
    """Failed: the gRPC status's name, HTTP and its code, or CONNECTION."""
    detail: str = ""
    retry_after_s: float | None = None
    """Refused: when the server says to come back."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    chunk_times_s: "array[float]" = field(default_factory=lambda: array("d"))
    """When each message with tokens came."""
    chunk_tokens: "array[int]" = field(default_factory=lambda: array("I"))

    @property
    def ttft_s(self) -> float:
        """From due to the first token; there must be one."""
        return self.chunk_times_s[0] - self.due_s

    @property
    def e2el_s(self) -> float:
        """From due to the end."""
        return self.end_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 where there is one alone."""
        if self.num_output_tokens < 2:
            return 0.0
        return (self.end_s - self.chunk_times_s[0]) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generator process did."""

    records: list[Record]
    cpu_s: float
    """Processor time that it took."""
    wall_s: float
    loop_lags_s: "array[float]"
    """How late its event loop came back to a timer, sampled through the run."""
    is_interrupted: bool = False
