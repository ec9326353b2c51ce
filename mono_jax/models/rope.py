"""Rotary position embeddings (half-rotation form) and how they scale: linear, dynamic NTK, Llama 3's, YaRN."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.models.architecture import Architecture, RopeScaling


def rotary(
    config: Architecture, positions: jax.Array, lengths: jax.Array, *, local: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., head_dim / 2] in float32 for ``positions`` [...].

    Args:
      positions: int [...], position of each token within its sample; visual tokens count like any other.
      lengths: int [...], current length L of the token's sample. Used only by dynamic scaling: beyond
        ``max_position_embeddings`` the base grows by (factor * L / max - (factor - 1)) ** (dim / (dim - 2)).
      local: the angles of sliding layers.
    """
    dim = config.head_dim
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, None
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    positions = positions.astype(jnp.float32)
    size = 1.0
    if scaling is not None and scaling.type == "dynamic":
        limit = config.max_position_embeddings
        growth = scaling.factor * lengths.astype(jnp.float32) / limit - (scaling.factor - 1)
        base = theta * jnp.where(lengths > limit, growth, 1.0) ** (dim / (dim - 2))
        inverse_frequency = 1.0 / base[..., None] ** exponents
    else:
        inverse_frequency = np.float32(1.0) / np.float32(theta) ** exponents
        if scaling is not None and scaling.type == "linear":
            positions = positions / scaling.factor
        elif scaling is not None and scaling.type == "llama3":
            inverse_frequency = _llama3(scaling, inverse_frequency)
        elif scaling is not None:
            inverse_frequency = _yarn(scaling, inverse_frequency, theta)
            size = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0)
    angles = positions[..., None] * inverse_frequency
    if size != 1.0:
        return size * jnp.cos(angles), size * jnp.sin(angles)
    return jnp.cos(angles), jnp.sin(angles)


def _llama3(scaling: RopeScaling, inverse_frequency: np.ndarray) -> np.ndarray:
    """float32 [D / 2]: long wavelengths divided by the factor, short ones unchanged, a ramp in between."""
    turns = scaling.original_max_position_embeddings * inverse_frequency.astype(np.float64) / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (inverse_frequency * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def _yarn(scaling: RopeScaling, inverse_frequency: np.ndarray, theta: float) -> np.ndarray:
    """float32 [D / 2]: frequencies with many turns in the original length unchanged, with few divided by the factor.

    YaRN, arXiv 2309.00071, section 3.2; the ramp runs over the dimensions, between integer ones.
    """
    half = len(inverse_frequency)

    def dimension(turns: float) -> float:
        return half * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(scaling.beta_fast or 32)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow or 1)), 2 * half - 1)
    scaled = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return (inverse_frequency * (1 - scaled + scaled / scaling.factor)).astype(np.float32)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates x [..., heads, head_dim] by angles given as [..., head_dim / 2]; same dtype as x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[..., None, :], sines[..., None, :]
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1).astype(
        x.dtype
    )
