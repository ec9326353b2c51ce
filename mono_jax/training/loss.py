"""Next-token cross entropy on the text slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mono_jax.axes import TENSOR
from mono_jax.models.sharding import by_rows, head_columns


def weighted_cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int = 0
) -> jax.Array:
    """Sum over slots of weight * cross entropy, float32 scalar.

    Args:
      hidden: [B, T, d], after the final norm.
      kernel: [d, vocabulary], the LM head.
      targets: int32 [B, T], ids of the next tokens.
      weights: float32 [B, T], 0 = not trained on.
      chunk: as for ``token_cross_entropy``.
    """
    losses = token_cross_entropy(hidden, kernel, targets, chunk=chunk)
    # where, not only a product: an unused slot must not turn the sum into NaN (0 * inf).
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))


def token_cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int = 0) -> jax.Array:
    """Cross entropy of each slot, float32 [B, T].

    Args:
      hidden: [B, T, d], after the final norm.
      kernel: [d, vocabulary], the LM head.
      targets: int32 [B, T], ids of the next tokens.
      chunk: slots of each row whose logits are in memory at once (recomputed in the backward pass); 0 = all. Every
        device works on its own rows in every chunk. With a vocabulary of 92,553 the float32 logits of 4,096 slots take
        1.5 GB.
    """
    vocabulary = kernel.shape[1]
    hidden, kernel = by_rows(hidden), head_columns(kernel.astype(hidden.dtype))

    def losses_of(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1])  # on CPUs faster than a product of [B, chunk, d]
        logits = jnp.einsum("nd,dv->nv", flat, kernel, preferred_element_type=jnp.float32)
        logits = by_rows(logits.reshape(*targets.shape, -1), None, TENSOR)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        if logits.shape[-1] > vocabulary:
            logits = jnp.where(column < vocabulary, logits, -jnp.inf)
        # A mask instead of a gather: its gradient is elementwise, not a scatter.
        at_target = jnp.sum(jnp.where(column == targets[..., None], logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - at_target

    rows, slots = targets.shape
    if not chunk or slots <= chunk:
        return losses_of(hidden, targets)

    def chunks(a: jax.Array) -> jax.Array:
        """[B, T, ...] as [T / chunk, B, chunk, ...]."""
        filled = jnp.pad(a, ((0, 0), (0, -slots % chunk), *((0, 0),) * (a.ndim - 2)))
        return filled.reshape(rows, -1, chunk, *a.shape[2:]).swapaxes(0, 1)

    losses = jax.lax.map(jax.checkpoint(lambda block: losses_of(*block)), (chunks(hidden), chunks(targets)))
    return losses.swapaxes(0, 1).reshape(rows, -1)[:, :slots]
