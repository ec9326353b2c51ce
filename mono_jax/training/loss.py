"""Next-token cross entropy on the text slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def weighted_cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int = 0
) -> jax.Array:
    """Sum over slots of weight * cross entropy, float32 scalar.

    Args:
      hidden: [B, T, d], after the final norm.
      kernel: [d, vocabulary], the LM head.
      targets: int32 [B, T], ids of the next tokens.
      weights: float32 [B, T], 0 = not trained on.
      chunk: slots whose logits are in memory at once (recomputed in the backward pass); 0 = all.
        With a vocabulary of 92,553 the float32 logits of 4,096 slots take 1.5 GB.
    """
    width = hidden.shape[-1]
    hidden, targets, weights = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)
    kernel = kernel.astype(hidden.dtype)

    def loss_of(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.einsum("nd,dv->nv", hidden, kernel, preferred_element_type=jnp.float32)
        # A mask instead of a gather: its gradient is elementwise, not a scatter.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
        at_target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - at_target
        # where, not only a product: an unused slot must not turn the sum into NaN (0 * inf).
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))

    if not chunk or hidden.shape[0] <= chunk:
        return loss_of(hidden, targets, weights)
    padding = -hidden.shape[0] % chunk
    padded = [jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))) for a in (hidden, targets, weights)]
    blocks = [a.reshape(-1, chunk, *a.shape[1:]) for a in padded]

    def body(total: jax.Array, block: list[jax.Array]) -> tuple[jax.Array, None]:
        return total + loss_of(*block), None

    return jax.lax.scan(jax.checkpoint(body), jnp.zeros((), jnp.float32), blocks)[0]
