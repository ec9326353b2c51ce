"""Packed attention: what every form computes.

A row holds the tokens of several samples. A token attends to the tokens of its own sample at its own position or before
it; which they are follows from positions and segments only, whatever the order of the slots:

    query slot i sees key slot j   iff   segments[i] == segments[j] > 0  and  positions[i] >= positions[j]

    query [B, Q, Hq, D], key and value [B, K, Hkv, D]     Hq a multiple of Hkv: query head h reads head h // (Hq // Hkv)
    scores = query * D ** -0.5 @ key.T, softmax in float32 over the keys that are seen, times value
    output [B, Q, Hq, D] in the dtype of query

Slots of segment 0 are empty: no query of another segment sees them, and what comes out for them is finite and of no
meaning (its cotangent must be zero). All forms are differentiable in query, key and value. Fused forms serve
self-attention of whole rows (Q = K = S) in sequence order only: there positions ascend within a sample and samples lie
one after the other, so "not later" is "not after", and blocks above the diagonal are skipped.

``checks.attention`` holds the float64 oracle that every form is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Slots(NamedTuple):
    """Where each slot stands: positions int32 [B, N] within its sample; segments int32 [B, N], 0 = empty."""

    positions: jax.Array
    segments: jax.Array


class SequenceOrder(NamedTuple):
    """``order`` int32 [B, S]: slot of each sequence position; ``inverse`` int32 [B, S]: sequence position of each
    slot.
    """

    order: jax.Array
    inverse: jax.Array


# (query, key, value, slots), all in sequence order -> output in sequence order.
Fused = Callable[[jax.Array, jax.Array, jax.Array, Slots], jax.Array]


def visible(query_slots: Slots, key_slots: Slots) -> jax.Array:
    """bool [B, Q, K]: same sample, not empty, not later."""
    same = query_slots.segments[:, :, None] == key_slots.segments[:, None, :]
    past = query_slots.positions[:, :, None] >= key_slots.positions[:, None, :]
    return same & past & (key_slots.segments[:, None, :] > 0)
