"""`sharded_ffn` with its gradients compiled ahead of time for a mesh of absent accelerators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.base import FfnWeights, Implementation
from pallas_kernels.registry import targeting
from pallas_kernels.sharded import sharded_ffn, sharded_tile_map


def compile_sharded_ffn(
    devices: Sequence[jax.Device],
    implementation: str | Implementation | None,
    *,
    rows: int,
    d: int,
    ff: int,
    tile: int,
    dtype: jnp.dtype,
    trained: str,
) -> jax.stages.Compiled:
    """Forward and backward for two shards of FFN columns, and as many shards of rows as there are pairs of devices.

    Args:
      devices: described chips of a topology, an even number of them.
      implementation: as for `modality_ffn`.
      rows: N over the whole mesh.
      d: model width.
      ff: hidden width over the whole mesh.
      tile: rows per tile.
      dtype: of rows and weights.
      trained: which experts have gradients, "both" or "visual".
    """
    mesh = Mesh(np.array(devices).reshape(-1, 2), ("data", "tensor"))
    options = {"mesh": mesh, "rows": ("data",)}

    def loss(x, text, visual, mask):
        tile_map = sharded_tile_map(mask, tile=tile, **options)
        y = sharded_ffn(x, tile_map, text, visual, columns="tensor", implementation=implementation, **options)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    def shaped(shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    into, out_of = partial(shaped, (d, ff), dtype, None, "tensor"), partial(shaped, (ff, d), dtype, "tensor")
    weights = FfnWeights(into(), into(), out_of())
    arguments = (shaped((rows, d), dtype, "data"), weights, weights, shaped((rows,), jnp.bool_, "data"))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if trained == "both" else (0, 2)))
    platform = "tpu" if devices[0].platform == "tpu" else "cuda"
    with targeting(devices[0]):
        return gradient.trace(*arguments).lower(lowering_platforms=(platform,)).compile()
