"""Llamas of random weights, for benchmarks: as large as wanted, and nothing to download."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints import make_tokenizer

VOCAB_SIZE = 8192
CHECKPOINTS = {
    "tiny": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1536},
    "small": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 3072},
}


def make_model(name: str, folder: Path) -> Path:
    """A Llama of random weights in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **CHECKPOINTS[name],
        num_key_value_heads=CHECKPOINTS[name]["num_attention_heads"] // 2,
        head_dim=64,
        vocab_size=VOCAB_SIZE * (2 if name == "small" else 1),
        initializer_range=0.04,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
