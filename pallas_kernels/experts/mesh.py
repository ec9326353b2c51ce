"""The grouped matmuls on the mesh in use (``devices``), or on one device if there is none.

Rows are split over some axes of the mesh, columns of the FFN over another, and each device groups and computes only
its own, so that no row moves to another device:

    rows      x, and the block experts or the block map, along their first axis
    slots     x [B, S, d] and the block experts along their second axis
    columns   gate, up [d, ff] by columns, down [ff, d] by rows; the partial sums of y are added over the axis

Axes that the mesh does not have split nothing, and columns are not split over an axis that does not divide them.
Weights must not be split over the axes of rows here; the partitioner gathers fully sharded parameters first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.devices import Axes, axis_that_splits, per_device
from pallas_kernels.experts.api import modality_ffn, modality_matmul, permuted_ffn, permuted_matmul
from pallas_kernels.experts.block_map import BlockMap, make_block_map
from pallas_kernels.experts.contract import FfnWeights, Implementation

# Which expert computes a row: for grouped rows, the expert of each block, int32 [B, S / block]; for rows in any order,
# a block map from `sharded_block_map`.
Routing = jax.Array | BlockMap


def sharded_block_map(mask: jax.Array, *, rows: Axes, block: int = 128, valid: jax.Array | None = None) -> BlockMap:
    """One block map per shard of rows (its indices are local), once per batch.

    Args:
      mask: bool [N], True where the row is visual; N a multiple of the number of shards.
      rows: axes of the mesh that split rows.
      block: rows per block.
      valid: bool [N], False for rows that no expert should compute; all rows by default.
    """
    valid = jnp.ones(mask.shape, bool) if valid is None else valid
    split = PartitionSpec(rows)

    def build(mask: jax.Array, valid: jax.Array) -> BlockMap:
        return make_block_map(mask, block=block, valid=valid)

    return per_device(build, (split, split), split)(mask, valid)


def sharded_ffn(
    x: jax.Array,
    routing: Routing,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    rows: Axes,
    slots: str | None = None,
    columns: str | None = None,
    block: int = 128,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """SwiGLU FFN of each row's own expert, in the shape and dtype of x.

    Args:
      x: [B, S, d], every block of ``block`` rows of one expert, B a multiple of the number of shards; or, with a block
        map, [N, d] in the order of its mask.
      routing: expert of each block, int32 [B, S / block] (0 = text, 1 = visual, -1 = empty), or a block map.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      rows: axes of the mesh that split rows; for a block map, those given to ``sharded_block_map``.
      slots: axis of the mesh that splits S, in whole blocks; not with a block map.
      columns: axis of the mesh that splits ff, or None.
      block: rows per block; a block map has its own.
      implementation: as for ``modality_ffn``; chosen for the sizes of one shard.
      save_gate_up: as for ``modality_ffn``.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    options = {"implementation": implementation, "save_gate_up": save_gate_up}

    def run(x: jax.Array, routing: Routing, *weights: FfnWeights) -> jax.Array:
        return _routed(modality_ffn, permuted_ffn, x, routing, weights, block, options)[None]

    split = axis_that_splits(text_weights[0].shape[1], columns)
    by_columns, by_rows = PartitionSpec(None, split), PartitionSpec(split, None)
    weights, own = FfnWeights(by_columns, by_columns, by_rows), _own(rows, slots)
    partial_sums = per_device(run, (own, own, weights, weights), PartitionSpec(split, *own))
    # The sum over `columns` is taken outside, where its transpose is a broadcast: the partitioner needs one all-reduce
    # (or a reduce-scatter, if y is wanted that way), and the backward pass needs none for it.
    return jnp.sum(partial_sums(x, routing, text_weights, visual_weights), axis=0)


def sharded_matmul(
    x: jax.Array,
    routing: Routing,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    rows: Axes,
    slots: str | None = None,
    columns: str | None = None,
    sums: str | None = None,
    block: int = 128,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """Each row times the kernel [d, f] of its own expert: [B, S, d] -> [B, S, f], or with a block map [N, d] -> [N, f].

    f is split over ``columns``, or d over ``sums``, over which partial sums are added; at most one of the two. Other
    arguments and errors are as for ``sharded_ffn``.
    """

    def run(x: jax.Array, routing: Routing, *kernels: jax.Array) -> jax.Array:
        return _routed(modality_matmul, permuted_matmul, x, routing, kernels, block, {"implementation": implementation})

    (features, width), own = text_kernel.shape, _own(rows, slots)
    split, added = axis_that_splits(width, columns), axis_that_splits(features, sums)
    kernel, between = PartitionSpec(added, split), [None] * (x.ndim - 1 - len(own))
    x_split, out = PartitionSpec(*own, *between, added), PartitionSpec(*own, *between, split)
    if added is None:
        return per_device(run, (own, own, kernel, kernel), out)(x, routing, text_kernel, visual_kernel)
    partial_sums = per_device(
        lambda *arguments: run(*arguments)[None], (x_split, own, kernel, kernel), PartitionSpec(added, *out)
    )
    return jnp.sum(partial_sums(x, routing, text_kernel, visual_kernel), axis=0)  # outside: see ``sharded_ffn``


def _own(rows: Axes, slots: str | None) -> PartitionSpec:
    """How x and its routing are split."""
    return PartitionSpec(rows) if slots is None else PartitionSpec(rows, slots)


def _routed(
    grouped: Callable[..., jax.Array],
    permuted: Callable[..., jax.Array],
    x: jax.Array,
    routing: Routing,
    weights: tuple[Any, Any],
    block: int,
    options: dict[str, Any],
) -> jax.Array:
    """One device's rows, in one call of ``grouped``, or of ``permuted`` if there is a block map."""
    if isinstance(routing, BlockMap):
        return permuted(x, routing, *weights, **options)
    y = grouped(x.reshape(-1, x.shape[-1]), routing.reshape(-1), *weights, block=block, **options)
    return y.reshape(*x.shape[:-1], -1)
