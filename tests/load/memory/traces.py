"""Lengths of requests as two public data sets have them, and nothing else of these: seeded draws, kept as small files.

Lengths are lognormal, with the means that Kwon et al. report ("Efficient Memory Management for Large Language Model
Serving with PagedAttention", SOSP 2023, section 6.1), sigma 1.0, cut at max_model_len. One length is drawn from each of
as many equal slices of the distribution as there are requests, in random order, so that few requests have its mean.

`python -m tests.load.memory.traces` writes the files.
"""

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

MAX_MODEL_LEN = 2048
SIGMA = 1.0
FOLDER = Path(__file__).with_name("traces")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of one request, in tokens."""

    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """What a trace is drawn from; means in tokens, before the cut."""

    mean_prompt_tokens: int
    mean_output_tokens: int
    num_requests: int
    seed: int


SPECS = {
    "ShareGPT": TraceSpec(161, 338, num_requests=200, seed=1),
    "Alpaca": TraceSpec(19, 58, num_requests=600, seed=2),
}


def draw_trace(spec: TraceSpec) -> list[Lengths]:
    """The same for the same spec, on any machine."""
    rng = random.Random(spec.seed)
    prompts = _lognormal(rng, spec.mean_prompt_tokens, spec.num_requests)
    outputs = _lognormal(rng, spec.mean_output_tokens, spec.num_requests)
    cut = [min(num_tokens, MAX_MODEL_LEN - 1) for num_tokens in prompts]
    return [Lengths(p, min(o, MAX_MODEL_LEN - p)) for p, o in zip(cut, outputs, strict=True)]


def _lognormal(rng: random.Random, mean: float, count: int) -> list[int]:
    normal = NormalDist(math.log(mean) - SIGMA**2 / 2, SIGMA)
    lengths = [max(1, round(math.exp(normal.inv_cdf((i + rng.random()) / count)))) for i in range(count)]
    rng.shuffle(lengths)
    return lengths


def read_trace(name: str) -> list[Lengths]:
    """One of SPECS, from its file."""
    with _path(name).open(newline="") as file:
        return [Lengths(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]


def _path(name: str) -> Path:
    return FOLDER / f"{name.lower()}.csv"


def main() -> None:
    """See the module."""
    for name, spec in SPECS.items():
        rows = [f"{lengths.num_prompt_tokens},{lengths.num_output_tokens}\n" for lengths in draw_trace(spec)]
        _path(name).write_text("prompt_tokens,output_tokens\n" + "".join(rows))


if __name__ == "__main__":
    main()
