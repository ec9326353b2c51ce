"""Which blocks a kernel has to visit when each query sees an interval of keys.

    query block i                    key blocks
    (rows q0 .. q1)     . . [ partly | seen by all rows | partly ] . . .
                            start     full_start         full_stop  stop

``first`` and ``last`` ascend along a row, so ``first[q0]`` and ``last[q1]`` bound what any row of the block sees, and
``first[q1]`` and ``last[q0]`` what all of them see. Blocks seen by all rows need no mask; blocks outside the run need
no work. The queries that see a block of keys are an interval as well, found by searching ``first`` and ``last``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spans(NamedTuple):
    """Blocks to visit, int32 [B, blocks] each: start .. stop - 1, of which full_start .. full_stop - 1 need no mask.

    start <= full_start <= full_stop <= stop.
    """

    start: jax.Array
    full_start: jax.Array
    full_stop: jax.Array
    stop: jax.Array


def key_spans(first: jax.Array, last: jax.Array, block_q: int, block_kv: int) -> Spans:
    """Key blocks for each block of queries.

    Args:
      first: int32 [B, Q], first key that each query sees; Q a multiple of ``block_q``.
      last: int32 [B, Q], last key, not before the first.
      block_q: queries of a block.
      block_kv: keys of a block.
    """
    least, greatest = first[:, ::block_q], last[:, block_q - 1 :: block_q]
    all_from, all_to = first[:, block_q - 1 :: block_q], last[:, ::block_q] + 1
    return _spans(least, all_from, all_to, greatest + 1, block_kv)


def query_spans(first: jax.Array, last: jax.Array, keys: int, block_q: int, block_kv: int) -> Spans:
    """Query blocks for each block of keys; arguments as for ``key_spans``.

    A block of keys that no query sees has start == stop.
    """
    lowest = jnp.arange(0, keys, block_kv, dtype=jnp.int32)
    highest = lowest + block_kv - 1

    def queries(bounds: jax.Array, keys: jax.Array, side: str) -> jax.Array:
        """Number of queries whose bound is below the key (or at it, with "right")."""
        return jax.vmap(lambda row: jnp.searchsorted(row, keys, side=side))(bounds).astype(jnp.int32)

    start, stop = queries(last, lowest, "left"), queries(first, highest, "right")
    return _spans(start, queries(last, highest, "left"), queries(first, lowest, "right"), stop, block_q)


def _spans(start: jax.Array, all_from: jax.Array, all_to: jax.Array, stop: jax.Array, block: int) -> Spans:
    """In blocks, from bounds in rows: ``stop`` and ``all_to`` are exclusive."""
    empty = start >= stop
    start, stop = start // block, -(-stop // block)
    stop = jnp.where(empty, start, stop)
    full_start = jnp.clip(-(-all_from // block), start, stop)
    full_stop = jnp.clip(all_to // block, full_start, stop)
    return Spans(start, full_start, full_stop, stop)
