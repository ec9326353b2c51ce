"""Multimodal mixture of experts with static routing (Mono-InternVL, eq. 4-5).

Slots are modality-major: of x [B, S, d] the first V slots are visual. Each expert is a dense layer on
its own slots; nothing is routed on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mono_jax.config import MmoeImplementation

Expert = Callable[[jax.Array], jax.Array]


def by_modality(
    text: Expert, visual: Expert | None, x: jax.Array, visual_slots: int, implementation: MmoeImplementation
) -> jax.Array:
    """Applies ``visual`` to x[:, :visual_slots] and ``text`` to the rest.

    Args:
      text, visual: the two experts; without a visual one every slot takes ``text``.
      x: [B, S, d].
      implementation: "static", or "dense_both": both experts on all slots, chosen by mask (the naive
        form of the papers: twice the work; the oracle of the tests).
    """
    if visual is None or visual_slots == 0:
        return text(x)
    if implementation == "dense_both":
        is_visual = (jnp.arange(x.shape[1]) < visual_slots)[:, None]
        return jnp.where(is_visual, visual(x), text(x))
    if visual_slots == x.shape[1]:
        return visual(x)
    return jnp.concatenate([visual(x[:, :visual_slots]), text(x[:, visual_slots:])], axis=1)
