"""Small random checkpoints in Hugging Face's format, one per family and quirk, made through transformers.

Deterministic: the same family gives the same bytes. Weights are large (and biases and norms random too), so that greedy
output is as varied as the prompt and any slip in the arithmetic changes it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

VOCAB_SIZE = 320
MAX_MODEL_LEN = 512
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.35,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}


def _shape(hidden: int, inner: int, layers: int, heads: tuple[int, int]) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }


_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # Llama 3: grouped queries, long-context frequencies, untied.
    "llama3": (LlamaConfig, {**_shape(48, 112, 3, (6, 2)), "rope_parameters": _LLAMA3}),
    # Llama 2: as many KV heads as heads, biases everywhere, tied.
    "llama2": (
        LlamaConfig,
        {**_shape(40, 96, 2, (5, 5)), "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_linear": (LlamaConfig, {**_shape(32, 64, 2, (4, 1)), "rope_parameters": _LINEAR}),
    # Mistral: a window shorter than the prompts, head_dim apart from hidden_size / heads.
    "mistral": (MistralConfig, {**_shape(48, 80, 3, (3, 1)), "head_dim": 24, "sliding_window": 20}),
    # Qwen2: biases on q, k and v; a window in its upper layers only; tied.
    "qwen2": (
        Qwen2Config,
        {
            **_shape(56, 96, 3, (7, 1)),
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_yarn": (Qwen2Config, {**_shape(32, 64, 2, (4, 2)), "rope_parameters": _YARN}),
    # Qwen3: norms on heads, wide heads.
    "qwen3": (Qwen3Config, {**_shape(48, 96, 3, (4, 2)), "head_dim": 32, "tie_word_embeddings": False}),
}
FAMILIES = list(_CONFIGS)


def make_checkpoint(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint of `family` (one of FAMILIES) into `directory`, in several shards, and return it."""
    config_class, settings = _CONFIGS[family]
    config = config_class(**(_COMMON | settings))
    generator = torch.Generator().manual_seed(1000 + FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            spread = 0.2 if "norm" in name else config.initializer_range
            parameter.copy_(around + spread * torch.randn(parameter.shape, generator=generator))
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory, max_shard_size="40KB")
    make_tokenizer(directory)
    return directory


def make_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE of VOCAB_SIZE and write tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [__doc__ or "", CHAT_TEMPLATE, "the quick brown fox jumps over the lazy dog"], trainer
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_TOKEN_ID],
        "eos_token": SPECIAL_TOKENS[EOS_TOKEN_ID],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": MAX_MODEL_LEN,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
