"""Sharding constraints on activations, for places where the partitioner would have to guess.

By itself it may give each device a part of a contraction over all rows, and sum activations over devices.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mono_jax.axes import COLUMNS, CONTEXT, DATA, ROWS, TENSOR
from pallas_kernels.devices import axis_that_splits, devices_along, present_axes, split_mesh


def by_rows(x: jax.Array, columns: str | None = None) -> jax.Array:
    """x [B, S, ..., C] with its rows split over the axes that split rows, the slots S over ``context`` if it divides
    them, and C over the axis ``columns`` likewise.

    If no mesh is in use (``jax.sharding.get_abstract_mesh()``), or inside a ``shard_map``, x is unchanged.
    """
    mesh = split_mesh()
    if mesh is None:
        return x
    between = (None,) * (x.ndim - 3)
    spec = PartitionSpec(ROWS, axis_that_splits(x.shape[1], CONTEXT), *between, axis_that_splits(x.shape[-1], columns))
    return jax.lax.with_sharding_constraint(x, present_axes(mesh, spec))


def on_all(values: Any) -> Any:
    """The arrays of ``values``, each replicated on every device of the mesh in use, if there is one."""
    if split_mesh() is None:
        return values
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), values)


def from_columns(x: jax.Array) -> jax.Array:
    """``by_rows(x)`` for x [B, S, C] of an embedding whose columns C are split over all axes but ``data``.

    Done step by step, since the partitioner only knows exchanges of the innermost axis of a dimension; all at once it
    would give every device the embeddings of all rows.
    """
    mesh = split_mesh()
    if mesh is None or x.shape[-1] % math.prod(mesh.shape.get(axis, 1) for axis in COLUMNS):
        return by_rows(x)
    slots = axis_that_splits(x.shape[1], CONTEXT)
    for spec in ((DATA, None, COLUMNS), (ROWS, None, (TENSOR, CONTEXT)), (ROWS, slots, TENSOR), (ROWS, slots, None)):
        x = jax.lax.with_sharding_constraint(x, present_axes(mesh, PartitionSpec(*spec)))
    return x


def ways_of_rows() -> int:
    """The number of devices of the mesh in use that share the slots of each row."""
    return devices_along(CONTEXT)
