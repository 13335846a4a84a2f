"""Owns the prepared data of a training: a tokenizer and two rows of tokens, made once and then only read."""

import json
import platform
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploy.demo import corpus, dialogues
from deploy.demo.corpus import Corpus, Document
from deploy.demo.tokenizer import encode_stream, save_tokenizer, train_tokenizer

TRAIN, HELD_OUT, SUMMARY = "train.npy", "held_out.npy", "data.json"


def prepare_stdlib(folder: Path, seed: int) -> None:
    """Write the tokens of the running Python's standard library, and of chats about it, into `folder`."""
    parts = corpus.split(corpus.read_sources(corpus.stdlib_root()) + corpus.pydoc_topics(), seed)
    prepare(folder, parts, dialogues.synthesise(parts.train, seed), seed)


def prepare(folder: Path, parts: Corpus, chats: Sequence[Document], seed: int) -> None:
    """Train a tokenizer on the texts that are trained on, and write it and all tokens into `folder`."""
    # The library and the chats are in the stream twice, the test suite once: of its kind of text there is plenty.
    library = [document for document in parts.train if not corpus.is_test(document.path)]
    texts = [document.text for document in (*parts.train, *library, *chats, *chats)]
    # Files of one folder resemble each other; apart, every stretch of the stream has something of everything.
    random.Random(seed).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, folder)
    train = encode_stream(tokenizer, texts)
    held_out = encode_stream(tokenizer, (document.text for document in parts.held_out))
    np.save(folder / TRAIN, train)
    np.save(folder / HELD_OUT, held_out)
    summary = {
        "python": platform.python_version(),
        "num_files": len(parts.train),
        "num_test_files": len(parts.train) - len(library),
        "num_held_out_files": len(parts.held_out),
        "num_chats": len(chats),
        "num_stream_characters": sum(map(len, texts)),
        "num_stream_tokens": len(train),
        "num_held_out_tokens": len(held_out),
        "held_out_bytes": sum(len(document.text.encode()) for document in parts.held_out),
        "held_out_files": [document.path for document in parts.held_out],
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def load_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The prepared rows (train, held out): uint16 [num_tokens] each."""
    return np.load(folder / TRAIN), np.load(folder / HELD_OUT)
