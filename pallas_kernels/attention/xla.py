"""Attention by XLA's own operations: slots in any order, any device, Q and K of any length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.contract import Slots, visible


def probabilities_and_output(
    query: jax.Array, key: jax.Array, value: jax.Array, query_slots: Slots, key_slots: Slots
) -> tuple[jax.Array, jax.Array]:
    """Attention with its probabilities float32 [B, Hq, Q, K] in memory; output as the contract says."""
    b, q_len, heads, dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    # The queries of a group follow one another: plain batched products, no transposed scores.
    grouped = (query * dim**-0.5).reshape(b, q_len, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(b, kv_heads, group * q_len, dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv_heads, group, q_len, -1)
    scores = jnp.where(visible(query_slots, key_slots)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    mixed = probabilities.astype(value.dtype).reshape(b, kv_heads, group * q_len, -1)
    output = jnp.einsum("bhqk,bhkd->bhqd", mixed, value)
    output = output.reshape(b, kv_heads, group, q_len, dim).transpose(0, 3, 1, 2, 4)
    return probabilities.reshape(b, heads, q_len, -1), output.reshape(b, q_len, heads, dim)


def scores_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, query_slots: Slots, key_slots: Slots
) -> jax.Array:
    """All scores [B, Hq, Q, K] at once; made again in the backward pass, which takes less memory and, on CPUs, time."""
    return jax.checkpoint(lambda *args: probabilities_and_output(*args)[1])(query, key, value, query_slots, key_slots)


def chunked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, query_slots: Slots, key_slots: Slots, chunk: int
) -> jax.Array:
    """The same with the scores of ``chunk`` queries in memory at a time."""
    b, length = query.shape[:2]
    padding = -length % chunk
    slots = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, padding))), query_slots)
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))

    @jax.checkpoint
    def block(args: tuple[jax.Array, Slots]) -> jax.Array:
        q, s = args
        return probabilities_and_output(q, key, value, s, key_slots)[1]

    blocks = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(b, -1, chunk, *a.shape[2:]), 1, 0), (query, slots))
    output = jnp.moveaxis(jax.lax.map(block, blocks), 0, 1)
    return output.reshape(b, length + padding, *output.shape[3:])[:, :length]
