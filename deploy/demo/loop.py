"""Owns the training loop: a step's rows, learning rate and update, and what a resumed run needs.

Rows and learning rate are functions of the step's number and the settings alone, so a run that was cut and
resumed goes through the same steps as one that was not. Writes no files but its own checkpoint.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from deploy.demo.model import build_model, parameter_groups, token_loss
from deploy.demo.muon import Muon

CHECKPOINT = "checkpoint.pt"
EVAL_BATCH_TOKENS = 8192
NUM_EVAL_ROWS = 64  # a sample is enough to pick weights by; the figure of the record is over all rows


@dataclass(frozen=True, slots=True)
class Settings:
    """All that shapes a training; two runs with equal settings and data are the same run."""

    num_steps: int
    tokens_per_step: int = 4096
    length: int = 512
    # The last steps learn on longer rows, so that long prompts find positions the model has seen.
    long_length: int = 2048
    long_share: float = 0.15
    lr: float = 4e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    num_warmup_steps: int = 100
    max_grad_norm: float = 1.0
    eval_every: int = 200
    seed: int = 0

    @property
    def first_long_step(self) -> int:
        """The step from which rows are `long_length` tokens long."""
        return self.num_steps - int(self.long_share * self.num_steps)


@dataclass(slots=True)
class Progress:
    """Where a run stands. history: one entry for each evaluation, in nats a token."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    train_s: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to nothing at the last step."""
    if step < settings.num_warmup_steps:
        return settings.lr * (step + 1) / settings.num_warmup_steps
    share = (step - settings.num_warmup_steps) / max(1, settings.num_steps - settings.num_warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))


def batch_of(step: int, tokens: Tensor, settings: Settings) -> Tensor:
    """The rows of `step`: int64 [batch, length + 1].

    Each epoch cuts the stream into rows at another offset and takes them in another order.
    """
    is_long = step >= settings.first_long_step
    length = settings.long_length if is_long else settings.length
    batch_size = max(1, settings.tokens_per_step // length)
    num_rows = (len(tokens) - 1) // length - 1
    epoch, index = divmod(step - is_long * settings.first_long_step, max(1, num_rows // batch_size))
    rng = np.random.default_rng([settings.seed, is_long, epoch])
    offset = int(rng.integers(length))
    order = rng.permutation(num_rows)
    rows = np.take(order, range(index * batch_size, (index + 1) * batch_size), mode="wrap")
    starts = torch.from_numpy(rows * length + offset).to(tokens.device)
    return tokens[starts[:, None] + torch.arange(length + 1, device=tokens.device)].long()


def held_out_rows(tokens: Tensor, length: int, num_rows: int) -> Iterator[Tensor]:
    """At most `num_rows` rows, evenly spread over the held-out stream, in batches: int64 [batch, length + 1]."""
    num_all_rows = (len(tokens) - 1) // length
    picks = torch.linspace(0, num_all_rows - 1, min(num_rows, num_all_rows), device=tokens.device)
    for part in picks.long().split(max(1, EVAL_BATCH_TOKENS // length)):
        yield tokens[part[:, None] * length + torch.arange(length + 1, device=tokens.device)].long()


class Trainer:
    """One run: the model, its two optimizers and its progress."""

    def __init__(self, config: LlamaConfig, settings: Settings, device: str, compiled: bool = False) -> None:
        self.settings = settings
        self.device = device
        self.progress = Progress()
        self.model = build_model(config, settings.seed, settings.dropout).to(device)
        self.best_weights: dict[str, Tensor] = {}
        self._loss: Callable[..., Tensor] = torch.compile(token_loss, dynamic=False) if compiled else token_loss
        matrices, embeddings, vectors = parameter_groups(self.model)
        self.optimizers = (
            Muon(matrices, lr=settings.lr, momentum=0.95, weight_decay=settings.weight_decay),
            torch.optim.AdamW(
                [
                    {"params": embeddings, "weight_decay": settings.weight_decay},
                    {"params": vectors, "weight_decay": 0.0},
                ],
                lr=settings.lr,
                betas=(0.9, 0.95),
                fused=device != "cpu",
            ),
        )

    def step(self, tokens: Tensor) -> Tensor:
        """One update; the loss is still on the device, so that the host runs ahead."""
        self.model.train()
        rows = batch_of(self.progress.step, tokens, self.settings)
        loss = self._loss(self.model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.progress.step, self.settings)
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, length: int, num_rows: int) -> float:
        """Mean loss over rows of the held-out tokens, in nats a token."""
        self.model.eval()
        sums = [
            (float(token_loss(self.model, rows)) * len(rows), len(rows))
            for rows in held_out_rows(tokens, length, num_rows)
        ]
        return sum(loss for loss, _ in sums) / sum(count for _, count in sums)

    def run(self, train: np.ndarray, held_out: np.ndarray, folder: Path, max_minutes: float) -> bool:
        """Train to the last step or for `max_minutes`; True if it got to the end."""
        started = time.monotonic()
        train_tokens = torch.from_numpy(train.astype(np.int32)).to(self.device)
        held_out_tokens = torch.from_numpy(held_out.astype(np.int32)).to(self.device)
        settings, progress = self.settings, self.progress
        losses: list[Tensor] = []
        spent_before_s = progress.train_s
        bar = tqdm(total=settings.num_steps, initial=progress.step, unit="step", mininterval=1.0)
        while progress.step < settings.num_steps:
            losses.append(self.step(train_tokens))
            bar.update()
            if progress.step % settings.eval_every and progress.step < settings.num_steps:
                continue
            loss = self.evaluate(held_out_tokens, settings.length, NUM_EVAL_ROWS)
            # Judged on long rows: these hold all positions, and what is learned of far ones costs near ones little.
            long_loss = self.evaluate(held_out_tokens, settings.long_length, NUM_EVAL_ROWS)
            train_loss = float(torch.stack(losses).mean())
            losses.clear()
            progress.train_s = spent_before_s + time.monotonic() - started
            progress.history.append(
                {"step": progress.step, "train": train_loss, "held_out": loss, "held_out_long": long_loss}
            )
            bar.set_postfix(train=f"{train_loss:.3f}", held_out=f"{loss:.3f}")
            if long_loss < progress.best_loss:
                progress.best_loss, progress.best_step = long_loss, progress.step
                self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.save(folder)
            if time.monotonic() - started > max_minutes * 60:
                break
        bar.close()
        return progress.step >= settings.num_steps

    def save(self, folder: Path) -> None:
        """Write the checkpoint whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.settings,
            "progress": self.progress,
            "model": self.model.state_dict(),
            "best_weights": self.best_weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state_all() if self.device != "cpu" else [],
        }
        torch.save(state, folder / f"{CHECKPOINT}.new")
        (folder / f"{CHECKPOINT}.new").replace(folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`; False if there is none.

        Raises ValueError if it was made with other settings.
        """
        if not (folder / CHECKPOINT).exists():
            return False
        state: dict[str, Any] = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=False)
        if state["settings"] != self.settings:
            raise ValueError(f"{folder / CHECKPOINT} was made with {state['settings']}, not {self.settings}")
        self.progress = state["progress"]
        self.model.load_state_dict(state["model"])
        self.best_weights = {name: value.to(self.device) for name, value in state["best_weights"].items()}
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["rng"])
        if self.device != "cpu":
            torch.cuda.set_rng_state_all(state["device_rng"])
        return True
