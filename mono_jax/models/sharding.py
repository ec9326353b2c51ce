"""How activations lie on the mesh in use, said where the partitioner would have to guess.

Left to itself it may give each device a part of a contraction over all rows, and add activations up.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from mono_jax.axes import ROWS
from pallas_kernels.devices import axis_that_splits, present_axes, split_mesh


def by_rows(x: jax.Array, columns: str | None = None) -> jax.Array:
    """x [B, ..., C] with its rows split over the axes that split rows, and C over the axis ``columns`` if it divides.

    Where no mesh is in use (``jax.sharding.get_abstract_mesh()``), or inside a ``shard_map``, x as it is.
    """
    mesh = split_mesh()
    if mesh is None:
        return x
    between = (None,) * (x.ndim - 2)
    spec = PartitionSpec(ROWS, *between, axis_that_splits(x.shape[-1], columns))
    return jax.lax.with_sharding_constraint(x, present_axes(mesh, spec))


def on_all(values: Any) -> Any:
    """The arrays of ``values``, each of them whole on every device of the mesh in use, if one is."""
    if split_mesh() is None:
        return values
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), values)
