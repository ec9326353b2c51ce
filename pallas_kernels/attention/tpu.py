"""Attention by the Splash kernel that JAX ships for TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.contract import Slots
from pallas_kernels.devices import platform

LANES = 128  # rows must be a multiple of this many slots


def splash(query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots) -> jax.Array:
    """Causal by block; samples are kept apart by segment ids, there is no mask in memory. S a multiple of ``LANES``."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, dim = query.shape[1:]
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    interpret = platform() == "cpu"  # slow, for tests
    kernel = splash_attention.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (query * dim**-0.5, key, value))
    segments = splash_attention.SegmentIds(q=slots.segments, kv=slots.segments)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)
