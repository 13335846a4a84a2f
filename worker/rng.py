"""Random numbers as a function of (seed, output index): nothing to store, nothing to restore."""

import numpy as np
from numpy.typing import NDArray


def draw(seeds: NDArray[np.uint64], indexes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits each: splitmix64 (Steele, Lea, Flood 2014) of each seed at each output index."""
    x: NDArray[np.uint64]
    with np.errstate(over="ignore"):
        x = seeds + (indexes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def uniforms(seeds: NDArray[np.uint64], indexes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) of 53 bits."""
    return (draw(seeds, indexes) >> np.uint64(11)).astype(np.float64) * 2.0**-53
