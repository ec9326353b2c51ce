"""Into sequence order and back, for fused kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.attention.contract import Fused, SequenceOrder, Slots
from pallas_kernels.devices import Axes, axis_that_splits, per_device


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [B, S, ...] in the order given; the backward pass gathers too (a scatter would be slow)."""
    del inverse
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0))(x, order)


def _permute_fwd(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return permute(x, order, inverse), (order, inverse)


def _permute_bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = residuals
    return permute(gradient, inverse, order), None, None


permute.defvjp(_permute_fwd, _permute_bwd)


def in_sequence_order(
    fused: Fused,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    sequence: SequenceOrder,
    *,
    rows: Axes = (),
    heads: str | None = None,
) -> jax.Array:
    """Runs ``fused`` on arrays in sequence order and puts the output back into slots.

    Args:
      fused: (query, key, value, slots) in sequence order -> output in sequence order.
      query: [B, S, Hq, D] in the order of the slots.
      key: [B, S, Hkv, D], likewise.
      value: likewise.
      slots: of all three.
      sequence: the order and its inverse.
      rows: axes of the mesh in use that split rows.
      heads: axis of the mesh in use that splits heads, if it divides Hkv.
    """

    def run(query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots, sequence: SequenceOrder) -> jax.Array:
        order, inverse = sequence
        q, k, v = (permute(a, order, inverse) for a in (query, key, value))
        ordered = jax.tree.map(lambda a: jnp.take_along_axis(a, order, axis=1), slots)
        return permute(fused(q, k, v, ordered), inverse, order)

    by_head = PartitionSpec(rows, None, axis_that_splits(key.shape[2], heads))
    by_row = PartitionSpec(rows)
    split = per_device(run, (by_head, by_head, by_head, by_row, by_row), by_head)
    return split(query, key, value, slots, sequence)
