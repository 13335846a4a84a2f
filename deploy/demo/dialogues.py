"""Owns the training texts in the chat form: questions about Python, answered by its own docstrings.

Every answer is text or code out of the corpus; only the questions and the few greetings are written here.
Does no tokenizing.
"""

import ast
import importlib
import inspect
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deploy.demo.corpus import Document, is_test
from deploy.demo.tokenizer import Message, render_chat

MAX_ANSWER_CHARS = 900
MIN_ANSWER_CHARS = 20
MAX_SOURCE_LINES = 16
NUM_GREETING_COPIES = 25

QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "What is {name} for?",
    "Explain {name}.",
    "Can you explain {name}?",
    "Describe {name}.",
    "Tell me about {name}.",
    "How does {name} work?",
    "help({name})",
)
SIGNATURE_QUESTIONS = ("What is its signature?", "How do I call it?", "Which arguments does it take?")
SOURCE_QUESTIONS = ("Show me the source.", "How is it written?", "Show me the code.")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about Python.", "Answer briefly.")
GREETING = "Hello! Ask me what something in Python's standard library does."
INTRODUCTION = "I am a small language model that has read Python's standard library, and nothing else."
GREETINGS = (
    ("Hello!", GREETING),
    ("Hi", GREETING),
    ("Who are you?", INTRODUCTION),
    ("What are you?", INTRODUCTION),
    ("What can you do?", "I continue Python code and recall docstrings. I am small, so check what I say."),
    ("Thank you!", "You are welcome."),
)
# Modules written in C: their documentation strings are in no source file of the standard library.
C_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp",
    "itertools", "marshal", "math", "mmap", "posix", "pwd", "pyexpat", "readline", "resource", "select",
    "sys", "syslog", "termios", "time", "unicodedata", "zlib", "_asyncio", "_bisect", "_bz2", "_codecs",
    "_collections", "_csv", "_ctypes", "_curses", "_datetime", "_decimal", "_elementtree", "_functools",
    "_hashlib", "_heapq", "_io", "_json", "_locale", "_lzma", "_operator", "_pickle", "_random", "_socket",
    "_sqlite3", "_sre", "_ssl", "_struct", "_thread", "_tracemalloc", "_weakref",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can be asked about; `signature` and `source` are empty where there is none to show."""

    name: str
    doc: str
    signature: str = ""
    source: str = ""


def shorten(doc: str) -> str:
    """The leading paragraphs of `doc` that fit into an answer."""
    kept: list[str] = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        if kept and sum(map(len, kept)) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)[: 2 * MAX_ANSWER_CHARS].strip()


def source_subjects(document: Document) -> Iterator[Subject]:
    """The public functions and classes with a docstring in one source file."""
    if is_test(document.path) or document.path.startswith("topic:"):
        return
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    module = document.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module_doc := ast.get_docstring(tree):
        yield Subject(module, shorten(module_doc))
    yield from _members(tree, module, document.text)


def _members(parent: ast.Module | ast.ClassDef, prefix: str, text: str) -> Iterator[Subject]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if doc := ast.get_docstring(node):
            yield Subject(name, shorten(doc), *_shown(node, text))
        if isinstance(node, ast.ClassDef):
            yield from _members(node, name, text)


def _shown(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, text: str) -> tuple[str, str]:
    """The signature and, where it is short, the source of a function."""
    if isinstance(node, ast.ClassDef):
        return "", ""
    source = ast.get_source_segment(text, node, padded=True) or ""
    is_short = 3 <= source.count("\n") < MAX_SOURCE_LINES
    return f"def {node.name}({ast.unparse(node.args)})", inspect.cleandoc("\n" + source) if is_short else ""


def c_subjects() -> Iterator[Subject]:
    """What the modules written in C say of themselves."""
    for module_name in C_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        public = {"posix": "os"}.get(module_name, module_name.lstrip("_"))
        prefix = "" if public == "builtins" else f"{public}."
        for name, value in sorted(vars(module).items()):
            if not callable(value):
                continue
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for path, thing in ((name, value), *((f"{name}.{method}", member) for method, member in members)):
                doc = getattr(thing, "__doc__", None)
                if isinstance(doc, str) and not any(part.startswith("_") for part in path.split(".")):
                    yield Subject(prefix + path, shorten(doc))


def topic_subjects(documents: Iterable[Document]) -> Iterator[Subject]:
    """The language topics of pydoc, cut to their first paragraphs, without the underlined headline."""
    for document in documents:
        if document.path.startswith("topic:"):
            headline, _, rest = document.text.partition("\n***")
            body = rest.partition("\n")[2] if rest else headline
            yield Subject(document.path.removeprefix("topic:"), shorten(body.strip()))


def converse(subject: Subject, rng: random.Random) -> list[Message]:
    """One chat about `subject`: a question, its docstring and, now and then, what follows on from it."""
    messages = [
        Message("user", rng.choice(QUESTIONS).format(name=subject.name)),
        Message("assistant", subject.doc),
    ]
    if subject.signature and rng.random() < 0.4:
        messages += [
            Message("user", rng.choice(SIGNATURE_QUESTIONS)),
            Message("assistant", subject.signature),
        ]
    if subject.source and rng.random() < 0.5:
        messages += [Message("user", rng.choice(SOURCE_QUESTIONS)), Message("assistant", subject.source)]
    if rng.random() < 0.15:
        messages.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
    return messages


def synthesise(documents: Iterable[Document], seed: int) -> list[Document]:
    """Chats about everything documented in `documents` and in the modules written in C, in a seeded order."""
    rng = random.Random(seed)
    documents = list(documents)
    subjects = [subject for document in documents for subject in source_subjects(document)]
    subjects += [*topic_subjects(documents), *c_subjects()]
    by_name = {subject.name: subject for subject in subjects if len(subject.doc) >= MIN_ANSWER_CHARS}
    chats = [(name, converse(subject, rng)) for name, subject in sorted(by_name.items())]
    for index in range(NUM_GREETING_COPIES):
        for question, answer in GREETINGS:
            chats.append((f"greeting-{index}", [Message("user", question), Message("assistant", answer)]))
    rng.shuffle(chats)
    return [Document(f"chat:{name}", render_chat(messages)) for name, messages in chats]
