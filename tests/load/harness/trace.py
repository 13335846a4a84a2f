"""A trace of requests with their times, a JSON object a line, in the form that Mooncake's published traces have.

{"timestamp": milliseconds from the start, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}

hash_ids are optional: each names 512 tokens of the prompt (the last one what is left), the same id the same tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.load.harness.errors import LoadError

CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request."""

    due_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    chunk_ids: tuple[int, ...] = ()

    def shared_chunks(self) -> Iterator[tuple[int, int]]:
        """(id, tokens) of each part of the prompt that others may have too."""
        left = self.num_prompt_tokens
        for chunk_id in self.chunk_ids:
            num_tokens = min(CHUNK_TOKENS, left)
            if num_tokens:
                yield chunk_id, num_tokens
            left -= num_tokens


def read_trace(path: Path) -> list[TraceRow]:
    """All rows, by time. Raises LoadError that names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--dataset-path {path}: {error}", 2) from None
    rows = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise LoadError(f"--dataset-path {path}: has no requests", 2)
    return sorted(rows, key=lambda row: row.due_s)


def _parse(path: Path, number: int, line: str) -> TraceRow:
    try:
        fields = json.loads(line)
        row = TraceRow(
            float(fields["timestamp"]) / 1e3,
            int(fields["input_length"]),
            int(fields["output_length"]),
            tuple(int(chunk_id) for chunk_id in fields.get("hash_ids", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"--dataset-path {path}: line {number}: {error!r}", 2) from None
    if row.due_s < 0 or row.num_prompt_tokens < 1 or row.num_output_tokens < 1:
        raise LoadError(f"--dataset-path {path}: line {number}: a time below 0, or a length below 1", 2)
    return row
