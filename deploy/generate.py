"""One generation from the terminal: builds the request, prints the text as it comes, says what went wrong in a line."""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import grpc.aio
from pagoda.v1 import generation_pb2 as pb

from deploy.call import call_at, explain
from deploy.errors import DeployError
from scheduler.client import PagodaClient, StreamError

_CANCEL_TIMEOUT_S = 2.0


@dataclass(slots=True)
class ChoiceOutcome:
    """What has come of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    score: float | None = None

    def add(self, delta: pb.Delta) -> None:
        """Takes in the next piece."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.finish_reason:
            self.finish_reason = pb.FinishReason.Name(delta.finish_reason).removeprefix("FINISH_REASON_").lower()
            usage = delta.usage
            self.usage = {field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields}
            self.score = delta.score if delta.HasField("score") else None

    def to_fields(self) -> dict[str, object]:
        """As JSON has them: a score only where the choice was ranked by one."""
        fields = asdict(self)
        return fields if self.score is not None else {name: fields[name] for name in fields if name != "score"}


class Outcome:
    """What has come of a request; writes each choice's text as it comes, but only when those before it are whole."""

    def __init__(self, request: pb.GenerateRequest, write: Callable[[str], object]) -> None:
        self.request_id = request.request_id
        self.choices = [ChoiceOutcome() for _ in range(max(1, request.n))]
        self._write = write
        self._shown = 0
        self._title()

    def add(self, delta: pb.Delta) -> None:
        """Takes in the next piece."""
        self.choices[delta.choice].add(delta)
        if delta.choice != self._shown:
            return
        self._write(delta.text)
        while self.choices[self._shown].finish_reason and self._shown + 1 < len(self.choices):
            self._shown += 1
            self._write("\n")
            self._title()
            self._write(self.choices[self._shown].text)

    def _title(self) -> None:
        if len(self.choices) > 1:
            self._write(f"--- choice {self._shown}\n")

    def to_json(self) -> str:
        """One object on one line; where there are several choices they are a list in it."""
        choices = [choice.to_fields() for choice in self.choices]
        body = choices[0] if len(choices) == 1 else {"choices": choices}
        return json.dumps({"request_id": self.request_id, **body}, ensure_ascii=False)


def build_request(fields: Mapping[str, object], sampling: Mapping[str, object]) -> pb.GenerateRequest:
    """A request from flags that are named as its fields; None is unset. Raises DeployError that names the flag."""
    request = pb.GenerateRequest(request_id=uuid.uuid4().hex, resumable=True)
    for name, value in sampling.items():
        _set(request.sampling, name, value)
    for name, value in fields.items():
        _set(request, name, value)
    return request


def parse_ids(flag: str, text: str | None) -> list[int] | None:
    """`1,2,3`; raises DeployError."""
    try:
        return None if text is None else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DeployError(f"{flag} {text}: must be ids with commas between, as in 1,2,3", 2) from None


async def stream(client: PagodaClient, request: pb.GenerateRequest, write: Callable[[str], object]) -> Outcome:
    """Runs a request to its end, passing its text on as it comes; cancels it when it is cancelled itself.

    Raises DeployError for whatever the service or the way to it says.
    """
    outcome = Outcome(request, write)
    try:
        async for delta in client.generate(request):
            outcome.add(delta)
    except (asyncio.CancelledError, BrokenPipeError):
        with suppress(grpc.aio.AioRpcError):
            await client.cancel(request.request_id, timeout_s=_CANCEL_TIMEOUT_S)
        raise
    except grpc.aio.AioRpcError as error:
        raise explain(error) from None
    except StreamError as error:
        raise DeployError(f"the service broke off: {error}") from None
    for choice in outcome.choices:
        if choice.finish_reason in ("abort", "error"):
            raise DeployError(f"request {outcome.request_id} ended with {choice.finish_reason}")
    return outcome


def generate_at(port: int, request: pb.GenerateRequest, as_json: bool) -> None:
    """`pagoda generate`: the text as it comes, or one JSON object at the end."""

    async def generate(client: PagodaClient) -> None:
        outcome = await stream(client, request, (lambda text: None) if as_json else write_out)
        write_out((outcome.to_json() if as_json else "") + "\n")

    call_at(port, generate)


async def show_run(address: str, request: pb.GenerateRequest, began_s: float) -> None:
    """`pagoda run`: the prompt and what follows it, then how long it took since `began_s` (monotonic)."""
    first_s: float | None = None

    def show(text: str) -> None:
        nonlocal first_s
        first_s = first_s or time.monotonic()
        write_out(text)

    write_out(request.text)
    async with PagodaClient(address) as client:
        outcome = await stream(client, request, show)
    write_out("\n")
    num_tokens, first_s = len(outcome.choices[0].token_ids), first_s or time.monotonic()
    rate = (num_tokens - 1) / max(time.monotonic() - first_s, 1e-9)
    waited = f"the first {first_s - began_s:.1f} s after the start, then {rate:.0f} a second"
    sys.stderr.write(f"[{num_tokens} tokens, {waited}]\n")


def write_out(text: str) -> None:
    """Text to the terminal, now, and as UTF-8 whatever the locale says."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _set(message: Any, name: str, value: Any) -> None:
    if value is None:
        return
    try:
        if name == "token_ids":
            message.token_ids.CopyFrom(pb.TokenIds(ids=value))
        elif name == "chat":
            message.chat.messages.add(role="user", content=value)
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, "text" if name == "prompt" else name, value)
    except (ValueError, TypeError, UnicodeError):
        flag = "--" + name.replace("_", "-")
        raise DeployError(f"{flag} {value!r}: out of range, or not UTF-8", 2) from None
