"""Owns the command line that trains the demo model: `python -m deploy.demo.train --work .demo-train`.

Prepares the data if the work folder has none, goes on from its checkpoint if there is one, and writes the
model, its loss curve and its record into --out.
"""

import argparse
import datetime
import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from deploy.demo import prepare
from deploy.demo.export import draw_losses, export_model, write_record
from deploy.demo.loop import Settings, Trainer
from deploy.demo.model import model_config
from deploy.demo.sample import show_samples


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    defaults = Settings(num_steps=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".demo-train"), help="untracked: data and checkpoints")
    parser.add_argument("--run", default="run", help="name of the run's folder under --work")
    parser.add_argument("--out", type=Path, default=Path("deploy/demo"), help="where the result goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the loss with torch.compile")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--max-minutes", type=float, default=600.0, help="stop, save and export after this")
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument("--length", type=int, default=defaults.length, help="tokens a row")
    parser.add_argument("--long-share", type=float, default=defaults.long_share, help="steps on long rows")
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    parser.add_argument("--dropout", type=float, default=defaults.dropout)
    parser.add_argument("--warmup-steps", type=int, default=defaults.num_warmup_steps)
    parser.add_argument("--eval-every", type=int, default=defaults.eval_every, help="steps apart")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    return parser.parse_args(arguments)


def hardware(device: str) -> str:
    """What the training ran on, in words."""
    if device == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name()


def main(arguments: list[str]) -> None:
    """Prepare, train, export."""
    options = parse(arguments)
    data = options.work / "data"
    if not (data / prepare.TRAIN).exists():
        prepare.prepare_stdlib(data, options.seed)
    train, held_out = prepare.load_tokens(data)
    settings = Settings(
        num_steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        length=options.length,
        long_share=options.long_share,
        lr=options.lr,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
        num_warmup_steps=options.warmup_steps,
        eval_every=options.eval_every,
        seed=options.seed,
    )
    torch.set_float32_matmul_precision("high")
    config = model_config()
    trainer = Trainer(config, settings, options.device, compiled=options.compile)
    if trainer.resume(options.work / options.run):
        print(f"going on from step {trainer.progress.step}")
    trainer.run(train, held_out, options.work / options.run, options.max_minutes)

    options.out.mkdir(parents=True, exist_ok=True)
    model = export_model(config, trainer.best_weights, data, options.out / "model")
    # Measured once more on what is kept: the weights rounded to bfloat16.
    trainer.model.load_state_dict(model.float().state_dict())
    held_out_tokens = torch.from_numpy(held_out.astype("int32")).to(options.device)
    kept_loss = trainer.evaluate(held_out_tokens, settings.length, len(held_out))
    long_loss = trainer.evaluate(held_out_tokens, settings.long_length, len(held_out))
    progress = trainer.progress
    summary = json.loads((data / prepare.SUMMARY).read_text())
    record = {
        "command": shlex.join(["python", "-m", "deploy.demo.train", *arguments]),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hardware": hardware(options.device),
        "torch": torch.__version__,
        "num_parameters": model.num_parameters(),
        "num_steps": progress.step,
        "num_tokens_seen": progress.step * settings.tokens_per_step,
        "num_epochs": round(progress.step * settings.tokens_per_step / len(train), 2),
        "train_s": round(progress.train_s, 1),
        "kept_step": progress.best_step,
        "kept_held_out_loss": round(kept_loss, 4),
        "kept_held_out_loss_long_rows": round(long_loss, 4),
        "kept_held_out_bits_per_byte": round(
            kept_loss / 0.6931471805599453 * summary["num_held_out_tokens"] / summary["held_out_bytes"], 4
        ),
        "settings": asdict(settings),
        "data": summary,
        "history": progress.history,
    }
    write_record(record, options.out / "training.json")
    draw_losses(progress.history, progress.best_step, options.out / "loss.png")
    print(f"held-out loss {kept_loss:.4f} after {progress.step} steps, {progress.train_s:.0f} s")
    show_samples(options.out / "model", num_tokens=120, device=options.device)


if __name__ == "__main__":
    main(sys.argv[1:])
