"""Rotary position embedding: frequencies of each supported rope_type, and the angles of all positions.

Arithmetic follows transformers.modeling_rope_utils, step by step in float32, so that float32 ids agree.
"""

import math

import torch

from kernels import Angles
from worker.models.spec import RopeSpec


class Rope:
    """The angles of one model's positions, in its dtype, on its device: cos, sin, [num_positions, 1, head_dim / 2]."""

    def __init__(
        self, spec: RopeSpec, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inverse_frequencies, attention_factor = _inverse_frequencies(spec, head_dim)
        angles = torch.arange(num_positions)[:, None].float() * inverse_frequencies
        # A step looks them up: computed each time, they would take longer than a small product.
        self.cos, self.sin = (
            (x * attention_factor).to(device=device, dtype=dtype)[:, None] for x in (angles.cos(), angles.sin())
        )

    def angles(self, positions: torch.Tensor) -> Angles:
        """For positions [num_tokens], int64."""
        return Angles(self.cos.index_select(0, positions), self.sin.index_select(0, positions))


def _inverse_frequencies(spec: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """[head_dim / 2] float32, and the factor of cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (spec.theta**exponents)
    if spec.rope_type == "linear":
        return plain / spec.factor, 1.0
    if spec.rope_type == "llama3":
        return _llama3(spec, plain), 1.0
    if spec.rope_type == "yarn":
        return _yarn(spec, head_dim, spec.theta**exponents), _yarn_attention_factor(spec)
    return plain, 1.0


def _llama3(spec: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    length = spec.original_max_position_embeddings
    wavelengths = 2 * math.pi / plain
    stretched = torch.where(wavelengths > length / spec.low_freq_factor, plain / spec.factor, plain)
    smooth = (length / wavelengths - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - smooth) * stretched / spec.factor + smooth * stretched
    is_long = wavelengths > length / spec.low_freq_factor
    is_short = wavelengths < length / spec.high_freq_factor
    return torch.where(~is_long & ~is_short, blended, stretched)


def _yarn(spec: RopeSpec, head_dim: int, frequencies: torch.Tensor) -> torch.Tensor:
    """A ramp between kept and stretched wavelengths (YaRN, arXiv 2309.00071)."""

    def dimension(num_rotations: float) -> float:
        turns = spec.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (spec.factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept


def _yarn_attention_factor(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * mscale * math.log(spec.factor) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)
