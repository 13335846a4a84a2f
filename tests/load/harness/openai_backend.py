"""A server that speaks OpenAI's HTTP API: streaming /v1/completions over prompts of token ids, or of text.

Tokens are counted by the usage of each message where the server gives it (vLLM: continuous_usage_stats), else a message
is one token, and the usage at the end says how many there were in all. A server that takes only what OpenAI's own API
has (transformers serve) gets text (Target.tokenizer) and no ignore_eos.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from tests.load.harness.backend import Call, CallError, Chunk, ServerSample, Usage
from tests.load.harness.errors import LoadError
from tests.load.harness.settings import Target
from tests.load.harness.workload import DEFAULT_VOCAB_SIZE, ServedModel

MAX_LINE_BYTES = 1 << 20


class OpenAIBackend:
    """See Backend. Its connections are kept and taken again."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._base_url = target.address.rstrip("/").removesuffix("/v1")
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=target.request_timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=MAX_LINE_BYTES)
        self._model_name = target.model
        self._tokenizer = None if target.tokenizer is None else Tokenizer.from_file(str(target.tokenizer))

    async def model(self) -> ServedModel:
        """See Backend."""
        try:
            async with self._session.get(f"{self._base_url}/v1/models") as response:
                response.raise_for_status()
                served = (await response.json())["data"]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise LoadError(f"--base-url {self._base_url}: no list of models: {error!r}") from None
        found = [model for model in served if self._target.model in (None, model.get("id"))]
        if not found:
            raise LoadError(f"--model {self._target.model}: not served at {self._base_url}", 2)
        self._model_name = str(found[0]["id"])
        known = DEFAULT_VOCAB_SIZE if self._tokenizer is None else self._tokenizer.get_vocab_size()
        vocab_size = self._target.vocab_size or known
        return ServedModel(self._model_name, vocab_size, int(found[0].get("max_model_len") or 0))

    async def stream(self, call: Call) -> AsyncIterator[Chunk]:
        """See Backend."""
        try:
            async with self._session.post(f"{self._base_url}/v1/completions", json=self._body(call)) as response:
                if response.status != 200:
                    raise _refused(response.status, await response.text(), response.headers.get("Retry-After"))
                async for chunk in _chunks(response.content, call.needs_ids):
                    yield chunk
        except TimeoutError:
            raise CallError("DEADLINE_EXCEEDED", f"not done in {self._target.request_timeout_s} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallError("CONNECTION", repr(error)) from None

    def _body(self, call: Call) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model_name,
            "prompt": self._prompt(call),
            "max_tokens": call.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._tokenizer is None:  # vLLM's own; others that take ids ignore it
            body["stream_options"]["continuous_usage_stats"] = True
        if self._target.ignore_eos:
            body["ignore_eos"] = True
        if self._target.temperature is not None:
            body["temperature"] = self._target.temperature
        if call.needs_ids:
            body["return_token_ids"] = True
        return body

    def _prompt(self, call: Call) -> list[int] | str:
        if self._tokenizer is None:
            return call.token_ids
        return str(self._tokenizer.decode(call.token_ids, skip_special_tokens=False))

    async def cancel(self, request_id: str) -> None:
        """OpenAI's API has no such call; Settings refuses who asks for it."""
        raise NotImplementedError

    async def sample(self) -> ServerSample | None:
        """See Backend."""
        return None

    async def close(self) -> None:
        """See Backend."""
        await self._session.close()


async def _chunks(lines: aiohttp.StreamReader, needs_ids: bool) -> AsyncIterator[Chunk]:
    """Server-sent events up to [DONE], or to the end where a reason for it was given (transformers serve).

    Raises CallError for an error in the stream, and for an end before either.
    """
    num_counted, is_finished = 0, False
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise CallError("HTTP stream", json.dumps(event["error"]))
        chunk = _to_chunk(event, num_counted, needs_ids)
        num_counted += chunk.num_tokens
        if chunk.num_tokens or chunk.usage:
            yield chunk
        is_finished = is_finished or any(choice.get("finish_reason") for choice in event.get("choices") or ())
    if not is_finished:
        raise CallError("CONNECTION", "the stream ended before [DONE]")


def _to_chunk(event: dict[str, Any], num_counted: int, needs_ids: bool) -> Chunk:
    """One event; the last ones have the usage of all."""
    usage: dict[str, Any] | None = event.get("usage")
    choices: list[dict[str, Any]] = event.get("choices") or []
    has_text = bool(choices) and bool(choices[0].get("text") or choices[0].get("token_ids"))
    if usage is not None and usage.get("completion_tokens") is not None:
        num_tokens = usage["completion_tokens"] - num_counted if choices else 0
    else:
        num_tokens = int(has_text)
    token_ids = (choices[0].get("token_ids") or ()) if choices and needs_ids else ()
    is_last = not choices or choices[0].get("finish_reason")
    if usage is None or not is_last:
        return Chunk(num_tokens, token_ids)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    total = Usage(usage.get("prompt_tokens") or 0, cached, usage.get("completion_tokens") or 0)
    return Chunk(num_tokens, token_ids, total)


def _refused(status: int, text: str, retry_after: str | None) -> CallError:
    try:
        delay_s = None if retry_after is None else float(retry_after)
    except ValueError:
        delay_s = None  # a date: who refuses a load test by the calendar is not asked again
    return CallError(f"HTTP {status}", " ".join(text.split())[:200], delay_s)
