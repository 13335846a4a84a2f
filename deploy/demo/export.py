"""Owns what a finished training leaves in the repository: the checkpoint, the loss curve and its record."""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from deploy.demo.tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export_model(config: LlamaConfig, weights: dict[str, Tensor], data: Path, folder: Path) -> LlamaForCausalLM:
    """Write `weights` in bfloat16 and the tokenizer of `data` the way Hugging Face lays out a checkpoint."""
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        eos_token_id=[SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END_OF_TURN)],
    )
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(data / name, folder / name)
    return model


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write the training's figures."""
    path.write_text(json.dumps(record, indent=2) + "\n")


def draw_losses(history: list[dict[str, float]], best_step: int, path: Path) -> None:
    """Draw training and held-out loss over the steps."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [entry["step"] for entry in history]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, [entry["train"] for entry in history], label="training", color="#8a8f98")
    axes.plot(steps, [entry["held_out"] for entry in history], label="held-out files", color="#b5462f")
    axes.axvline(best_step, color="#b5462f", linewidth=0.8, linestyle=":", label=f"kept: step {best_step}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="The demo model's training")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
