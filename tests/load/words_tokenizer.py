"""A tokenizer whose every id is a word of its own, for random checkpoints and prompts of random ids."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_words_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id is a word of its own: text brings back the ids that it was made of, and every token shows.

    In the form of Llama 2's tokenizers, which all peers read. No token ends a generation: not every server can be told
    to ignore the one that would.
    """
    words = ["<s>", "</s>", "<unk>", *(f"▁w{number}" for number in range(3, vocab_size))]
    vocab = {word: number for number, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
