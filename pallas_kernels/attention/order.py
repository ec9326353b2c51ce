"""Into sequence order and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [B, S, ...] in the given order; the backward pass gathers too (a scatter would be slow)."""
    del inverse
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0))(x, order)


def _permute_fwd(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return permute(x, order, inverse), (order, inverse)


def _permute_bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = residuals
    return permute(gradient, inverse, order), None, None


permute.defvjp(_permute_fwd, _permute_bwd)
