"""Small tokenizer folders, made on the spot: one byte-level, one SentencePiece-like with byte fallback."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def read_lines(path):\n    with open(path) as lines:\n        return [line.strip() for line in lines]\n",
    "The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore.",
    "für Käse, garçon! naïve café, Übermut",
] * 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "        {{ raise_exception('unknown role ' + message['role']) }}\n"
    "    {% endif %}\n"
    "<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(folder: Path, **config: Any) -> Path:
    """As Llama 3's and Qwen's: byte-level BPE; begin-of-sequence by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return save(tokenizer, folder, config)


def byte_fallback(folder: Path, **config: Any) -> Path:
    """As Llama 2's and Mistral's: SentencePiece's conventions, unknown characters as bytes."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({char for text in CORPUS for char in text.replace(" ", "▁") if char.isascii() or char == "▁"})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "s"), ("e", "r"), ("i", "n")]
    tokens += letters + [a + b for a, b in merges]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return save(tokenizer, folder, config)


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> Path:
    """Writes the folder; `config`: files' names without .json, and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    } | config.pop("tokenizer_config", {})
    files = {"tokenizer_config": settings, "config": {"vocab_size": tokenizer.get_vocab_size()}} | config
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
