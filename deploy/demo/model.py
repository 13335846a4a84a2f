"""Owns the shape of the demo model and what training adds to it: dropout, loss, groups of parameters."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo.tokenizer import END_OF_TEXT, MAX_LENGTH, SPECIAL_TOKENS, VOCAB_SIZE


def model_config(num_layers: int = 4, hidden_size: int = 256, vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """A Llama with grouped queries and tied embeddings; the defaults make 4.0M parameters."""
    head_dim = 64 if hidden_size >= 256 else 16
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=hidden_size // head_dim // 2,
        head_dim=head_dim,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
        pad_token_id=None,
    )


def build_model(config: LlamaConfig, seed: int, dropout: float) -> LlamaForCausalLM:
    """A model with seeded weights, those that write into the residual stream the smaller the deeper it is.

    Llama has no dropout of its own; hooks put it after the embedding and each attention and feed-forward.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, param in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.num_hidden_layers))

    def drop(module: nn.Module, _: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return F.dropout(output[0], dropout, module.training), *output[1:]
        return F.dropout(output, dropout, module.training)

    if dropout > 0:
        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)
    return model


def token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token after its row's first. rows: int64 [batch, length + 1]."""
    # bfloat16 only where it is fast: many CPUs have no such instructions, and emulate it at a third of the speed.
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.is_cuda):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def parameter_groups(model: LlamaForCausalLM) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices of the layers, the embedding, the norms' vectors)."""
    matrices, embeddings, vectors = [], [], []
    for name, param in model.named_parameters():
        target = vectors if param.ndim < 2 else embeddings if "embed_tokens" in name else matrices
        target.append(param)
    return matrices, embeddings, vectors
