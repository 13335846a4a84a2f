"""What a generator asks of a server, whichever it is: a stream of messages with tokens, and how it failed."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tests.load.harness.errors import LoadError
from tests.load.harness.settings import Target
from tests.load.harness.workload import ServedModel


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    request_id: str
    token_ids: list[int]
    max_tokens: int
    needs_ids: bool = False
    """Whether the ids of the answer are wanted, for the next turn."""


class Usage(NamedTuple):
    """What the server says that a request took, in tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class Chunk(NamedTuple):
    """One message of a stream. The last one has the usage, where the server gives it."""

    num_tokens: int
    token_ids: Sequence[int] = ()
    usage: Usage | None = None
    was_aborted: bool = False
    """The server ended it before its end, because somebody asked for that."""


class CallError(Exception):
    """A request that failed; `status` as Record has it."""

    def __init__(self, status: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class ServerSample:
    """The server's own counters at one moment; sums over its workers."""

    at_s: float
    num_running: int = 0
    num_waiting: int = 0
    num_live_requests: int = 0
    num_streams: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    """By state: free, referenced, cached; host_free, host_cached where there is a host pool."""
    totals: dict[str, float] = field(default_factory=dict)
    """What only grows: steps, tokens, prefix queries and hits, preemptions, processor time."""


class Backend(Protocol):
    """One connection to one server."""

    async def model(self) -> ServedModel:
        """What it serves. Raises LoadError where nobody answers."""

    def stream(self, call: Call) -> AsyncIterator[Chunk]:
        """Runs a request. Raises CallError; closing the iterator leaves the request without a word."""

    async def cancel(self, request_id: str) -> None:
        """Asks the server to end a request; its stream says what came of it."""

    async def sample(self) -> ServerSample | None:
        """Its counters; None where it has none, or does not answer now."""

    async def close(self) -> None:
        """Ends the connection."""


def connect(target: Target) -> Backend:
    """A connection of the kind that the target asks for; nothing is sent yet."""
    if target.backend == "pagoda":
        from tests.load.harness.pagoda_backend import PagodaBackend

        return PagodaBackend(target)
    try:
        from tests.load.harness.openai_backend import OpenAIBackend
    except ModuleNotFoundError as error:
        raise LoadError(f"--backend openai needs {error.name}; pip install 'pagoda[load]'") from None
    return OpenAIBackend(target)
