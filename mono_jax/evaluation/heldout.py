"""Held-out loss: what retention of the language ability is measured with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.models.transformer import Model, Params
from mono_jax.training.step import loss_sum


def heldout_loss(
    model: Model, params: Params, batches: Iterable[Mapping[str, np.ndarray]], dtype: jnp.dtype = jnp.bfloat16
) -> float:
    """Mean cross entropy (nats) per trained token over ``batches``, weighted as the batches say.

    The same parameters give the same float to the last bit. nan if no token is trained on.
    """

    @jax.jit
    def sums(params: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return loss_sum(model, params, {}, batch, dtype), batch["loss_weights"].sum()

    parts = [jax.device_get(sums(params, batch)) for batch in batches]
    loss, weight = (float(np.sum([part[i] for part in parts], dtype=np.float64)) for i in range(2))
    return loss / weight if weight else float("nan")
