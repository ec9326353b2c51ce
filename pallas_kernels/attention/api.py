"""Packed attention in one function; ``contract`` defines what it computes.

On a mesh each device computes its own rows and heads. With context parallelism, several devices share a row. Either
each gathers the keys and values of all of them, puts them into sequence order, and computes its own queries; or they
exchange slots for heads, so that each has some heads of the whole row, and exchange back afterwards (DeepSpeed Ulysses,
arXiv 2309.14509).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.attention.contract import Implementation, Intervals, Problem
from pallas_kernels.attention.order import permute
from pallas_kernels.devices import Axes, axis_that_splits, device_key, devices_along, per_device
from pallas_kernels.errors import Unavailable
from pallas_kernels.registry import resolve


class SequenceOrder(NamedTuple):
    """``order`` int32 [B, S]: slot of each sequence position; ``inverse``: sequence position of each slot."""

    order: jax.Array
    inverse: jax.Array


class Parts(NamedTuple):
    """How several devices share the slots of each row: in equal parts, one after another.

    Attributes:
      sequence: order within each part, int32 [B, S]: both slots and sequence positions count from 0 in every part.
      intervals: of each part's queries in their sequence order, int32 [B, S]; keys count along the whole row.
    """

    sequence: SequenceOrder
    intervals: Intervals


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    sequence: SequenceOrder | None = None,
    *,
    implementation: str | Implementation | None = None,
    chunk: int | None = None,
    causal: bool = False,
    rows: Axes = (),
    heads: str | None = None,
    context: str | None = None,
    ulysses: bool = False,
    parts: Parts | None = None,
) -> jax.Array:
    """Softmax attention of query [B, Q, Hq, D] over the keys [B, K, Hkv, D] that each query sees.

    Args:
      query: [B, Q, Hq, D], in sequence order, or in slot order if ``sequence`` is given.
      key: [B, K, Hkv, D], likewise.
      value: likewise.
      intervals: in sequence order, even if ``sequence`` is given; or with ``places``, for keys in any order.
      sequence: the order of Q = K = S slots that are not in sequence order; the output keeps the slot order.
      implementation: a name ("splash"), an instance, or None: the first suitable one in the device's tuning table.
      chunk: queries at a time, for implementations that work in chunks.
      causal: whether every query is known to see its sample up to itself.
      rows: axes of the mesh in use that split rows.
      heads: axis of the mesh in use that splits heads, if it divides Hkv.
      context: axis of the mesh in use that splits the slots of a row; requires ``sequence``.
      ulysses: devices along ``context`` exchange slots for heads; otherwise they gather keys and values.
      parts: ``parts_of`` the devices along ``context`` if they gather, computed once for all layers.

    Returns:
      [B, Q, Hq, D] in the dtype of query. Values in empty slots are finite but meaningless.

    Raises:
      Unavailable: the requested implementation, or every one, cannot serve this call; the message says why.
    """
    ways = devices_along(context)
    problem = describe(query, key, causal=causal, in_order=intervals.places is None, ways=1 if ulysses else ways)
    chosen = choose(problem, implementation)
    if chunk is not None:
        chosen = chosen.with_chunk(chunk)
    by_head = PartitionSpec(rows, context, axis_that_splits(key.shape[2], heads))
    if ways > 1 and not ulysses:
        parts = parts_of(sequence, intervals, ways) if parts is None else parts
        return _over_context(chosen, query, key, value, intervals, sequence, parts, by_head)
    if ways == 1 and chosen.any_order:
        return chosen(query, key, value, intervals if sequence is None else of_slots(intervals, sequence))
    return _whole_rows(chosen, (query, key, value), intervals, sequence, by_head)


def _over_context(
    chosen: Implementation,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    intervals: Intervals,
    sequence: SequenceOrder,
    parts: Parts,
    by_head: PartitionSpec,
) -> jax.Array:
    """Each device computes its own queries; gradients of keys and values are summed on the devices that own them."""
    rows, context, _ = by_head
    whole, own = PartitionSpec(rows), PartitionSpec(rows, context)

    def gathered(key: jax.Array, value: jax.Array) -> jax.Array:
        # In the backward pass the barrier follows the sum of gradients. XLA:TPU then uses a reduce-scatter for more
        # shapes, but not for all; for the others it is an all-reduce of which each device takes its part.
        own = jax.lax.optimization_barrier(jnp.concatenate([key, value], axis=2))
        return jax.lax.all_gather(own, context, axis=1, tiled=True)

    def any_order(query, key, value, first, last, places):
        return chosen(query, *jnp.split(gathered(key, value), 2, axis=2), Intervals(first, last, places))

    def in_order(query, key, value, sequence, parts):
        (order, inverse), (own_order, own_inverse) = sequence, parts.sequence
        both = jnp.split(permute(gathered(key, value), order, inverse), 2, axis=2)
        mixed = chosen(permute(query, own_order, own_inverse), *both, parts.intervals)
        return permute(mixed, own_inverse, own_order)

    if chosen.any_order:
        return per_device(any_order, (by_head, by_head, by_head, own, own, whole), by_head)(
            query, key, value, *of_slots(intervals, sequence)
        )
    return per_device(in_order, (by_head, by_head, by_head, whole, own), by_head)(query, key, value, sequence, parts)


def _whole_rows(
    chosen: Implementation,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    intervals: Intervals,
    sequence: SequenceOrder | None,
    by_head: PartitionSpec,
) -> jax.Array:
    """Each device computes some heads of whole rows; devices that share rows exchange slots for heads.

    Raises Unavailable if they cannot have equal numbers of heads.
    """
    rows, context, heads = by_head
    ways, kv_heads = devices_along(context), arrays[1].shape[2] // devices_along(heads)
    if kv_heads % ways:
        raise Unavailable(
            f"ulysses: {kv_heads} KV heads cannot be split equally among {ways} devices; gather keys and values instead"
        )

    def exchanged(x, split, joined):
        return x if ways == 1 else jax.lax.all_to_all(x, context, split_axis=split, concat_axis=joined, tiled=True)

    def run(arrays, intervals, sequence):
        whole = [exchanged(a, 2, 1) for a in arrays]
        if sequence is None:
            mixed = chosen(*whole, intervals)
        elif chosen.any_order:
            mixed = chosen(*whole, of_slots(intervals, sequence))
        else:
            order, inverse = sequence
            mixed = permute(chosen(*(permute(a, order, inverse) for a in whole), intervals), inverse, order)
        return exchanged(mixed, 1, 2)

    by_row = PartitionSpec(rows)
    return per_device(run, (by_head, by_row, by_row), by_head)(arrays, intervals, sequence)


def describe(query: jax.Array, key: jax.Array, *, causal: bool, in_order: bool = True, ways: int = 1) -> Problem:
    """The problem of attention of ``query`` over ``key`` (arrays or their shapes) on the device that is traced for.

    ``ways``: number of devices that share the queries of a row (devices that exchange heads have whole rows).
    """
    batch, queries, heads, dim = query.shape
    sizes = (batch, queries // ways, key.shape[1], heads, key.shape[2], dim)
    return Problem(*sizes, query.dtype.name, device_key(), causal and ways == 1, in_order)


def choose(problem: Problem, implementation: str | Implementation | None = None) -> Implementation:
    """The instance that serves ``problem``; ``implementation`` and errors as for ``attend``."""
    if isinstance(implementation, str):
        implementation = f"{Problem.ROOM}/{implementation}"
    return resolve(implementation, problem)


def parts_of(sequence: SequenceOrder, intervals: Intervals, ways: int) -> Parts:
    """The part of each of ``ways`` devices; ``intervals`` in sequence order."""
    inverse = sequence.inverse
    places = inverse.reshape(inverse.shape[0], ways, -1)
    order = jnp.argsort(places, axis=2)
    places = jnp.take_along_axis(places, order, axis=2).reshape(inverse.shape)
    own = SequenceOrder(*(a.reshape(inverse.shape) for a in (order, jnp.argsort(order, axis=2))))
    first, last = (jnp.take_along_axis(a, places, axis=1) for a in (intervals.first, intervals.last))
    return Parts(own, Intervals(first, last))


def of_slots(intervals: Intervals, sequence: SequenceOrder) -> Intervals:
    """The intervals in slot order."""
    first, last = (jnp.take_along_axis(a, sequence.inverse, axis=1) for a in (intervals.first, intervals.last))
    return Intervals(first, last, sequence.inverse)
