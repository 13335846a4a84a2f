"""A result, or two side by side, as one page that needs nothing else: no network, no other file."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tests.load.harness.errors import LoadError

_FOLDER = Path(__file__).parent


def render(title: str, results: Mapping[str, Mapping[str, Any]], comparison: Sequence[Sequence[str]] = ()) -> str:
    """The page. `results` by their names; `comparison`: rows of the table for two."""
    parts = {
        "title": escape(title),
        "style": _read("style.css"),
        "results": _script_json([{"name": name, "result": result} for name, result in results.items()]),
        "comparison": _script_json(comparison),
        "charts": _read("charts.js"),
        "report": _read("report.js"),
    }
    page, *pieces = _read("page.html").split("{{")
    for piece in pieces:
        name, _, text = piece.partition("}}")
        page += parts[name] + text
    return page


def write_page(page: str, path: Path) -> None:
    """Raises LoadError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, "utf-8")
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from None


def _read(name: str) -> str:
    return (_FOLDER / name).read_text("utf-8").rstrip("\n")


def _script_json(value: object) -> str:
    """JSON that no text in it can end the script with."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
