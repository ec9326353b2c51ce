"""Attention by cuDNN's fused kernel."""

from __future__ import annotations

import jax

from pallas_kernels.attention.contract import Slots, visible


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots) -> jax.Array:
    """Flash attention of bfloat16, D a multiple of 8; a mask [B, 1, S, S] for all heads keeps samples apart."""
    mask = visible(slots, slots)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
