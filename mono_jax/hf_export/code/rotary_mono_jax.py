"""Rotary position embeddings (half-rotation form) and how they scale: linear, dynamic NTK, Llama 3's, YaRN."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def rotary(a: SimpleNamespace, positions: Tensor, lengths: Tensor, sliding: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, Q, D / 2], at positions [B, Q] of samples whose current lengths are lengths [B].

    They are computed when needed: a buffer would have to survive the ways in which transformers initialises models.
    """
    theta, scaling = a.rope_theta, a.rope_scaling
    if sliding and a.rope_local_theta is not None:
        theta, scaling = a.rope_local_theta, None
    kind, factor = (scaling["type"], scaling["factor"]) if scaling else (None, 1.0)
    exponents = torch.arange(0, a.head_dim, 2, dtype=torch.float32, device=positions.device) / a.head_dim
    base = torch.full((1, 1, 1), theta, dtype=torch.float32, device=positions.device)
    if kind == "dynamic":
        limit = a.max_position_embeddings
        growth = torch.where(lengths > limit, factor * lengths.float() / limit - (factor - 1), 1.0)
        base = base * growth[:, None, None] ** (a.head_dim / (a.head_dim - 2))
    frequencies, size = 1.0 / base**exponents, 1.0
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "llama3":
        frequencies = _llama3(scaling, frequencies)
    elif kind == "yarn":
        frequencies = _yarn(scaling, frequencies, theta)
        size = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    angles = positions[..., None].float() * frequencies
    return size * angles.cos(), size * angles.sin()


def _llama3(scaling: dict[str, Any], frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones unchanged, a ramp in between."""
    turns = scaling["original_max_position_embeddings"] * frequencies.double() / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (frequencies * (kept + (1 - kept) / scaling["factor"])).float()


def _yarn(scaling: dict[str, Any], frequencies: Tensor, theta: float) -> Tensor:
    """YaRN, arXiv 2309.00071, section 3.2; the ramp runs over the dimensions, between integer ones."""
    half = frequencies.shape[-1]

    def dimension(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), 2 * half - 1)
    ramp = torch.arange(half, dtype=torch.float64, device=frequencies.device) - low
    scaled = (ramp / max(high - low, 0.001)).clamp(0, 1)
    return (frequencies * (1 - scaled + scaled / scaling["factor"])).float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates x [B, Q, heads, D] by angles [B, Q, 1, D / 2] in float32; returns the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)
