"""`make plots`: pictures of what `make bench-memory` measured, from its JSON."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from tests.load.memory.outcome import Outcome
from tests.load.memory.report import speed, total
from tests.stack import ROOT

mpl.use("Agg")
from matplotlib import pyplot as plt

PARTS = {
    "tokens": ("holds tokens", "#2f6d4f"),
    "internal": ("internal", "#c0392b"),
    "reserved": ("not filled yet", "#e59866"),
    "external": ("holes", "#7d3c98"),
}
COLOUR = "#34699a"
PAPER = {
    ("ShareGPT", "choices"): (16.2, 30.5),
    ("ShareGPT", "beams"): (44.3, 66.3),
    ("Alpaca", "choices"): (6.1, 9.8),
    ("Alpaca", "beams"): (37.6, 55.2),
}
"""Per cent of blocks saved, from 2 to 6 sequences: Kwon et al. (SOSP 2023), figure 15."""


def plot_use(runs: dict[str, dict[str, list[Outcome]]], path: Path) -> None:
    """Of the memory taken, or lost to holes, who has which part."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.2), sharey=True, squeeze=False)
    for axis, (trace, contenders) in zip(axes[0], runs.items(), strict=True):
        uses = [total(rounds).use for rounds in contenders.values()]
        lefts = [0.0] * len(uses)
        for part, (label, colour) in PARTS.items():
            widths = [100 * use.share(part) for use in uses]
            axis.barh(list(contenders), widths, left=lefts, label=label, color=colour)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        for position, use in enumerate(uses):
            axis.text(102, position, f"{100 * use.wasted:.1f} %\nwasted", va="center")
        axis.set(title=f"{trace}: KV memory taken", xlabel="% of it, over time", xlim=(0, 100))
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    _save(figure, path)


def plot_speed(runs: dict[str, dict[str, list[Outcome]]], path: Path) -> None:
    """Output tokens per second, and how many requests held memory."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 2.8), sharey=True, squeeze=False)
    for axis, (trace, contenders) in zip(axes[0], runs.items(), strict=True):
        speeds = [speed(rounds) for rounds in contenders.values()]
        axis.barh(list(contenders), speeds, color=COLOUR)
        for position, (rounds, value) in enumerate(zip(contenders.values(), speeds, strict=True)):
            held = f"{value:.0f} ({total(rounds).mean_num_held:.0f} requests at once)"
            axis.text(value + max(speeds) / 60, position, held, va="center")
        axis.set(title=f"{trace}: output tokens/s", xlim=(0, 2.2 * max(speeds)))
    axes[0][0].invert_yaxis()
    _save(figure, path)


def plot_sharing(savings: list[dict[str, Any]], path: Path) -> None:
    """Blocks saved by sharing, beside the range of the PagedAttention paper."""
    figure, axes = plt.subplots(1, len(PAPER), figsize=(2.6 * len(PAPER), 2.8), sharey=True)
    for axis, ((trace, kind), (lowest, highest)) in zip(axes, PAPER.items(), strict=True):
        names = [f"{trace}, {count} {kind}" for count in (2, 4, 6)]
        shares = [100 * saving["saved"] for name in names for saving in savings if saving["name"] == name]
        bars = axis.bar(["2", "4", "6"], shares, color=COLOUR, label="measured")
        axis.bar_label(bars, fmt="%.0f")
        axis.axhspan(lowest, highest, color="#e59866", alpha=0.4, zorder=0, label="the paper, 2 to 6")
        axis.set(title=f"{trace}, {kind}", xlabel=kind, ylim=(0, 80))
    axes[0].set_ylabel("% of blocks saved")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="what bench-memory wrote with --json")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    flags = parser.parse_args(arguments)
    found = json.loads(flags.figures.read_text())
    runs = {
        trace: {name: [Outcome.from_json(outcome) for outcome in rounds] for name, rounds in contenders.items()}
        for trace, contenders in found["runs"].items()
    }
    plot_use(runs, flags.folder / "memory-use.png")
    plot_speed(runs, flags.folder / "memory-throughput.png")
    plot_sharing(found["sharing"], flags.folder / "memory-sharing.png")


if __name__ == "__main__":
    main()
