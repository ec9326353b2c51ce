"""Rotary position embeddings (half-rotation form), with linear and dynamic-NTK scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.models.architecture import Architecture


def rotary(config: Architecture, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., head_dim / 2] in float32 for ``positions`` [...].

    Args:
      positions: int [...], position of each token within its sample; visual tokens count like any other.
      lengths: int [...], current length L of the token's sample. Only dynamic scaling reads it: beyond
        ``max_position_embeddings`` the base grows by (factor * L / max - (factor - 1)) ** (dim / (dim - 2)).
    """
    dim = config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    positions = positions.astype(jnp.float32)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        limit = config.max_position_embeddings
        growth = scaling.factor * lengths.astype(jnp.float32) / limit - (scaling.factor - 1)
        base = config.rope_theta * jnp.where(lengths > limit, growth, 1.0) ** (dim / (dim - 2))
        inverse_frequency = 1.0 / base[..., None] ** exponents
    else:
        inverse_frequency = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
        if scaling is not None:
            positions = positions / scaling.factor
    angles = positions[..., None] * inverse_frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates x [..., heads, head_dim] by angles given as [..., head_dim / 2]; same dtype as x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[..., None, :], sines[..., None, :]
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1).astype(
        x.dtype
    )
