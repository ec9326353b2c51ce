"""The intervals of packed rows, computed from the arrays of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.contract import Intervals


def packed_intervals(segments: jax.Array, visual: jax.Array | None = None) -> Intervals:
    """Intervals of rows in sequence order: causal within each sample.

    Args:
      segments: int32 [B, S], number of the sample; neighbours differ, 0 = empty. A sample's tokens are contiguous.
      visual: bool [B, S], for bidirectional images: a run of visual tokens within a sample (all tiles of one image)
        is seen by all of its tokens.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    empty = segments == 0
    first = _start_of_run(segments, index)
    last = index if visual is None else jnp.where(visual, _end_of_run(segments * 2 + visual, index), index)
    return Intervals(jnp.where(empty, index, first), jnp.where(empty, index, last))


def within_window(intervals: Intervals, window: int) -> Intervals:
    """The intervals of rows in sequence order without keys that are ``window`` or more before their query."""
    index = jnp.arange(intervals.first.shape[1], dtype=jnp.int32)
    return Intervals(jnp.maximum(intervals.first, index - (window - 1)), intervals.last)


def scattered_intervals(
    query_places: tuple[jax.Array, jax.Array],
    key_places: tuple[jax.Array, jax.Array],
    reach: jax.Array,
    window: jax.Array | None = None,
) -> Intervals:
    """Intervals of queries and keys at arbitrary places, as in a cache.

    Args:
      query_places: positions within the sample and segments, int32 [B, Q]; 0 = empty.
      key_places: likewise [B, K]; positions must be below K (the keys hold whole samples).
      reach: int32 [B, Q], the last position of its sample that each query sees.
      window: int32 scalar; keys that many positions or more before their query are not seen. None: all are.
    """
    keys = key_places[0].shape[1]
    positions, segments = query_places
    oldest = 0 if window is None else jnp.maximum(positions - (window - 1), 0)
    # A sample's keys get the places segment * K + position.
    return Intervals(segments * keys + oldest, segments * keys + reach, key_places[1] * keys + key_places[0])


def _start_of_run(values: jax.Array, index: jax.Array) -> jax.Array:
    """int32 [B, S]: index of the first element of the run of equal values that each element belongs to."""
    before = jnp.pad(values[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(values != before, index, 0), axis=1)


def _end_of_run(values: jax.Array, index: jax.Array) -> jax.Array:
    """int32 [B, S]: index of the last element of that run."""
    after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jax.lax.cummin(jnp.where(values != after, index, values.shape[1]), axis=1, reverse=True)
