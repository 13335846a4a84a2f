"""How long prompts and answers are, in tokens: drawn once for a run, by its seed. Pure.

Of as many equal slices of a lognormal distribution as there are requests, one length is drawn from each, in random
order: few requests have its mean, too, and two runs of different seeds hardly differ in their sums.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tests.load.harness.settings import Dataset

Lengths = npt.NDArray[np.int64]

MEANS = {"sharegpt": (161, 338), "alpaca": (19, 58)}
"""Prompt and output: what Kwon et al. report of the two data sets (SOSP 2023, section 6.1)."""
DEFAULT_MEANS = (1024, 128)
"""As `vllm bench serve` has them for random prompts."""


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """Of each request; one beyond the last has the first's."""

    prompts: Lengths
    outputs: Lengths

    def of(self, index: int) -> tuple[int, int]:
        """Prompt and output of one request."""
        at = index % len(self.prompts)
        return int(self.prompts[at]), int(self.outputs[at])


def draw_lengths(dataset: Dataset, num_requests: int, rng: np.random.Generator) -> DrawnLengths:
    """The lengths of a data set, its shared prefixes not counted."""
    mean_prompt, mean_output = MEANS.get(dataset.name, DEFAULT_MEANS)
    means = (dataset.input_len or mean_prompt, dataset.output_len or mean_output)
    if dataset.name in ("lognormal", "sharegpt", "alpaca", "conversation"):
        return DrawnLengths(*(lognormal(mean, dataset.length_sigma, num_requests, rng) for mean in means))
    return DrawnLengths(*(even(mean, dataset.range_ratio, num_requests, rng) for mean in means))


def lognormal(mean: float, sigma: float, num_requests: int, rng: np.random.Generator) -> Lengths:
    """Lognormal lengths with a mean; sigma is that of their logarithm."""
    if sigma == 0:
        return np.full(num_requests, round(mean))
    normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    shares = (np.arange(num_requests) + rng.uniform(1e-9, 1, num_requests)) / num_requests
    lengths = np.array([max(1, round(math.exp(normal.inv_cdf(share)))) for share in shares.tolist()])
    return rng.permutation(lengths)


def even(mean: int, range_ratio: float, num_requests: int, rng: np.random.Generator) -> Lengths:
    """Lengths that are all as likely, around their mean."""
    low, high = math.ceil(mean * (1 - range_ratio)), math.floor(mean * (1 + range_ratio))
    return rng.integers(max(1, low), max(1, high), num_requests, endpoint=True)
