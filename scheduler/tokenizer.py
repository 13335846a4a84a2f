"""Text to token ids and back, from a model folder's own files.

Owns the tokenizer, the chat template and what the folder says of defaults and end-of-sequence ids.
Knows nothing of requests or streams; needs neither torch nor transformers.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from scheduler.chat_template import ChatTemplate, ChatTemplateError


class TokenizerError(Exception):
    """The model folder's tokenizer files are missing or wrong; the text is one line that names the file."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that leaves these unset, from generation_config.json. top_k 0 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Tokenizer:
    """A model's tokenizer. `load` makes one; every method is safe to call from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate | None, facts: "_Facts") -> None:
        self.vocab_size: int = facts.vocab_size or backend.get_vocab_size()
        self.eos_token_ids: tuple[int, ...] = facts.eos_token_ids
        self.defaults: SamplingDefaults = facts.defaults
        self._backend = backend
        self._template = template
        self._pieces = _Pieces(backend)

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Reads tokenizer.json and the configuration files beside it; raises TokenizerError."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: a Hugging Face model folder with a tokenizer.json is needed")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} can't be read as a tokenizer: {_one_line(error)}") from None
        config = _read_json(model_dir / "tokenizer_config.json")
        special = _special_tokens(_read_json(model_dir / "special_tokens_map.json") | config)
        _prepare(backend, special)
        facts = _Facts.read(model_dir, backend.token_to_id(special["eos_token"]) if "eos_token" in special else None)
        return cls(backend, _load_template(model_dir, config, special), facts)

    @property
    def has_chat_template(self) -> bool:
        """Whether encode_chat works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the model's post-processor adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a conversation of (role, content), up to where the assistant speaks.

        Raises ChatTemplateError: the model has no template, or the template refuses the conversation.
        """
        if self._template is None:
            raise ChatTemplateError("the model has no chat template; send text or token ids")
        # The template writes the special tokens itself: the post-processor would double them.
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # As a batch of one: only that lets other threads run meanwhile, and megabytes take seconds.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out, incomplete characters show as U+FFFD."""
        return str(self._backend.decode(list(token_ids)))

    @property
    def replaces_each_byte(self) -> bool:
        """Whether each byte of a broken character shows as a U+FFFD of its own (else: one for all)."""
        return self._pieces.byte_fallback

    def piece(self, token_id: int) -> str | bytes:
        """What the id adds to a text: a string, or bytes where it holds parts of characters."""
        return self._pieces[token_id]


class _Pieces(dict[int, str | bytes]):
    """What each id adds to a text, worked out at first use."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        self._special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
        kinds = {part["type"] for part in [state, *state.get("decoders", [])] if "type" in part}
        self.byte_fallback = "ByteFallback" in kinds
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._join = backend.decoder.decode if backend.decoder else " ".join

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._compute(token_id)
        return piece

    def _compute(self, token_id: int) -> str | bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._special:
            return ""
        if self._byte_of is not None:
            known = [self._byte_of[char] for char in token if char in self._byte_of]
            return _text_or_bytes(bytes(known) if len(known) == len(token) else token.encode())
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return _text_or_bytes(bytes([int(token[3:5], 16)]))
        # Decoders drop or add a space at the start of a text: after another token shows what is inside.
        before = self._join(["a"])
        return str(self._join(["a", token])[len(before) :])


def _text_or_bytes(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in of each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True, slots=True)
class _Facts:
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults

    @classmethod
    def read(cls, model_dir: Path, eos_of_tokenizer: int | None) -> "_Facts":
        config = _read_json(model_dir / "config.json")
        path = model_dir / "generation_config.json"
        generation = _read_json(path)
        eos = generation.get("eos_token_id")
        if eos is None:
            eos = config.get("eos_token_id")
        if eos is None:
            eos = eos_of_tokenizer
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(token_id, int) for token_id in eos_ids):
            raise TokenizerError(f"{path}: eos_token_id must be an id or a list of ids, is {eos!r}")
        vocab_size = config.get("vocab_size") or 0
        return cls(int(vocab_size), tuple(dict.fromkeys(eos_ids)), _defaults(path, generation))


def _defaults(path: Path, generation: dict[str, Any]) -> SamplingDefaults:
    values = {name: generation.get(name) for name in ("temperature", "top_k", "top_p")}
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TokenizerError(f"{path}: {name} must be a number, is {value!r}")
    unset = SamplingDefaults()
    temperature = unset.temperature if values["temperature"] is None else float(values["temperature"])
    if generation.get("do_sample") is False:
        temperature = 0.0
    top_k = unset.top_k if values["top_k"] is None else int(values["top_k"])
    top_p = unset.top_p if values["top_p"] is None else float(values["top_p"])
    if not (0 <= temperature <= 100 and top_k >= 0 and 0 < top_p <= 1):
        raise TokenizerError(f"{path}: temperature={temperature} top_k={top_k} top_p={top_p} is out of range")
    return SamplingDefaults(_as_float32(temperature), top_k, _as_float32(top_p))


def _as_float32(value: float) -> float:
    """As a request carries it: a default that came back from a record must draw the same tokens."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _prepare(backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
    """Brings the tokenizer to what transformers makes of the same folder."""
    backend.no_truncation()  # settings left over from training would cut prompts in silence
    backend.no_padding()
    known = [token for token in special.values() if backend.token_to_id(token) is not None]
    backend.add_special_tokens(known)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... : each a string, or an object with its content."""
    found: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str) and content:
            found[name] = content
    return found


def _load_template(model_dir: Path, config: dict[str, Any], special: dict[str, str]) -> ChatTemplate | None:
    path = model_dir / "chat_template.jinja"
    source: Any
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    else:
        path, source = model_dir / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        return None
    try:
        return ChatTemplate(source, special)
    except ChatTemplateError as error:
        raise TokenizerError(f"{path}: {_one_line(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} can't be read as JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
