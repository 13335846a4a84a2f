"""Owns which text the demo model learns from, and which files it never sees.

The text is what ships with the running Python: the sources of its standard library, the test suite among
them, and the language topics of pydoc. Whether a file is held out depends on its path and the seed alone, so
any other Python can tell which of its own files the model has not seen. Does no tokenizing.
"""

import hashlib
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.02
MIN_FILE_CHARS = 200
# With fewer letters and spaces a file is a table (character maps, test vectors), not something to read.
MIN_READABLE_SHARE = 0.75
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
# A dictionary of strings in quotes; its topics are taken as plain text instead (`pydoc_topics`).
SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus; `path` is relative to the standard library, or a made-up name."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on, and what is only measured on."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def stdlib_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str, seed: int) -> bool:
    """Whether the file at `path`, relative to the standard library, is kept from training."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def is_test(path: str) -> bool:
    """Whether the file at `path` belongs to a test suite."""
    return any(part in ("test", "tests", "idle_test") for part in path.split("/"))


def readable_share(text: str) -> float:
    """Share of the characters of `text` that are letters or white space."""
    return sum(char.isalpha() or char.isspace() for char in text) / max(1, len(text))


def read_sources(root: Path) -> list[Document]:
    """The readable Python files under `root`, by path; what isn't UTF-8 is left out."""
    documents = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.as_posix() in SKIPPED_FILES:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite holds files that are broken on purpose
        if len(text) >= MIN_FILE_CHARS and readable_share(text) >= MIN_READABLE_SHARE:
            documents.append(Document(relative.as_posix(), text))
    return documents


def pydoc_topics() -> list[Document]:
    """What `help("for")` prints, one document for each topic; empty where this Python has no topics."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [Document(f"topic:{name}", text) for name, text in sorted(topics.items())]


def split(documents: list[Document], seed: int) -> Corpus:
    """Part `documents` into those trained on and those held out."""
    train = tuple(document for document in documents if not is_held_out(document.path, seed))
    held_out = tuple(document for document in documents if is_held_out(document.path, seed))
    return Corpus(train, held_out)
