"""The grouped matmuls on a mesh: rows over some axes, FFN columns over another.

Each shard of rows has a tile map of its own (indices are local), so grouping never moves a row to another device:

    rows axes     x [N, d], mask [N], the tile map's arrays     split along their first axis
    columns axis  gate, up [d, ff] by columns, down [ff, d] by rows; the partial sums of y are added over it

Weights must not be split over the rows axes here; with fully sharded parameters the partitioner gathers them first.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.experts.api import permuted_ffn, permuted_matmul
from pallas_kernels.experts.contract import FfnWeights, Implementation
from pallas_kernels.experts.tile_map import TileMap, make_tile_map

Axes = tuple[str, ...]


def sharded_tile_map(
    mask: jax.Array, *, mesh: Mesh, rows: Axes, tile: int = 128, valid: jax.Array | None = None
) -> TileMap:
    """One tile map per shard of rows, once per batch; arguments as for `make_tile_map`, N a multiple of the shards."""
    valid = jnp.ones(mask.shape, bool) if valid is None else valid
    split = PartitionSpec(rows)

    @partial(jax.shard_map, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False)
    def build(mask, valid):
        return make_tile_map(mask, tile=tile, valid=valid)

    return build(mask, valid)


def sharded_ffn(
    x: jax.Array,
    tile_map: TileMap,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    mesh: Mesh,
    rows: Axes,
    columns: str | None = None,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """`permuted_ffn` on a mesh: x [N, d] in original order -> [N, d].

    Args:
      x: rows split over the axes `rows`.
      tile_map: from `sharded_tile_map` with the same mesh and rows.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      mesh: the devices; axes of type Auto, as `jax.sharding.Mesh` makes them.
      rows: mesh axes that split rows.
      columns: mesh axis that splits ff, or None.
      implementation: as for `modality_ffn`; chosen for the sizes of one shard.
      save_gate_up: as for `modality_ffn`.
    """
    split = PartitionSpec(rows)
    weight_specs = FfnWeights(PartitionSpec(None, columns), PartitionSpec(None, columns), PartitionSpec(columns, None))

    # The sum over `columns` is taken outside, where its transpose is a broadcast: the partitioner adds with one
    # all-reduce (or reduce-scatter, if that is how y is wanted), and the backward pass needs none for it.
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, split, weight_specs, weight_specs),
        out_specs=PartitionSpec(columns, rows),
        check_vma=False,
    )
    def run(x, tile_map, text_weights, visual_weights):
        options = {"implementation": implementation, "save_gate_up": save_gate_up}
        return permuted_ffn(x, tile_map, text_weights, visual_weights, **options)[None]

    return jnp.sum(run(x, tile_map, text_weights, visual_weights), axis=0)


def sharded_matmul(
    x: jax.Array,
    tile_map: TileMap,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    mesh: Mesh,
    rows: Axes,
    columns: str | None = None,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """Each row times the kernel of its own expert, x [N, d] in original order -> [N, f], f split over `columns`."""
    split, kernel_spec = PartitionSpec(rows), PartitionSpec(None, columns)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, split, kernel_spec, kernel_spec),
        out_specs=PartitionSpec(rows, columns),
        check_vma=False,
    )
    def run(x, tile_map, text_kernel, visual_kernel):
        return permuted_matmul(x, tile_map, text_kernel, visual_kernel, implementation=implementation)

    return run(x, tile_map, text_kernel, visual_kernel)
