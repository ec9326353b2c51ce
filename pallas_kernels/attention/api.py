"""Packed attention behind one function; ``contract`` says what it computes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.attention.contract import Implementation, Intervals, Problem
from pallas_kernels.attention.order import permute
from pallas_kernels.devices import Axes, axis_that_splits, device_key, per_device
from pallas_kernels.registry import resolve


class SequenceOrder(NamedTuple):
    """``order`` int32 [B, S]: slot of each sequence position; ``inverse``: sequence position of each slot."""

    order: jax.Array
    inverse: jax.Array


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
) -> jax.Array:
    """Softmax attention of query [B, Q, Hq, D] over the keys [B, K, Hkv, D] that each query sees.

    Args:
      query: [B, Q, Hq, D], in sequence order; in the order of the slots where ``sequence`` is given.
      key: [B, K, Hkv, D], likewise.
      value: likewise.
      intervals: in sequence order, also where ``sequence`` is given; or with ``places``, for keys in any order.
      sequence: Q = K = S slots in an order of their own, which the output keeps too.
      implementation: a name ("splash"), an instance, or None: the first one in the device's tuning table that can.
      chunk: queries at a time, for an implementation that works so.
      causal: whether every interval is known to end at its own query.
      rows: axes of the mesh in use that split rows.
      heads: axis of the mesh in use that splits heads, if it divides Hkv.

    Returns:
      [B, Q, Hq, D] in the dtype of query. Empty slots give finite values of no meaning.

    Raises:
      Unavailable: the implementation that is asked for, or every one, cannot serve this call; the message says why.
    """
    problem = describe(query, key, causal=causal, in_order=intervals.places is None)
    chosen = choose(problem, implementation)
    if chunk is not None:
        chosen = chosen.with_chunk(chunk)
    if chosen.any_order:
        return chosen(query, key, value, intervals if sequence is None else of_slots(intervals, sequence))

    def run(query, key, value, intervals, sequence):
        if sequence is None:
            return chosen(query, key, value, intervals)
        order, inverse = sequence
        ordered = (permute(a, order, inverse) for a in (query, key, value))
        return permute(chosen(*ordered, intervals), inverse, order)

    by_head = PartitionSpec(rows, None, axis_that_splits(key.shape[2], heads))
    by_row = PartitionSpec(rows)
    split = per_device(run, (by_head, by_head, by_head, by_row, by_row), by_head)
    return split(query, key, value, intervals, sequence)


def describe(query: jax.Array, key: jax.Array, *, causal: bool, in_order: bool = True) -> Problem:
    """The problem of attention of ``query`` over ``key`` (arrays or their shapes) on the device that is traced for."""
    batch, queries, heads, dim = query.shape
    keys, kv_heads = key.shape[1:3]
    return Problem(batch, queries, keys, heads, kv_heads, dim, query.dtype.name, device_key(), causal, in_order)


def choose(problem: Problem, implementation: str | Implementation | None = None) -> Implementation:
    """The instance that serves ``problem``; ``implementation`` and errors as for ``attend``."""
    if isinstance(implementation, str):
        implementation = f"{Problem.ROOM}/{implementation}"
    return resolve(implementation, problem)


def of_slots(intervals: Intervals, sequence: SequenceOrder) -> Intervals:
    """The intervals of slots in an order of their own."""
    first, last = (jnp.take_along_axis(a, sequence.inverse, axis=1) for a in (intervals.first, intervals.last))
    return Intervals(first, last, sequence.inverse)
