"""How activations and the head lie on the mesh in use, said at the few places where the partitioner would guess.

Left to itself it may give each device a part of a contraction over all rows, and add activations up. Where no mesh is
in use (``jax.sharding.get_abstract_mesh()``), or inside a ``shard_map``, nothing here does anything.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mono_jax.axes import ROWS, TENSOR

VOCABULARY_MULTIPLE = 256  # two lane tiles of a TPU; any usual size of the tensor axis divides it


def by_rows(x: jax.Array, *rest: str | None) -> jax.Array:
    """x [B, ...] with its rows split over the axes that split rows, further dimensions over the axes in ``rest``."""
    mesh = _mesh()
    return x if mesh is None else _constrained(x, mesh, ROWS, *rest)


def head_columns(kernel: jax.Array) -> jax.Array:
    """The head [d, vocabulary] as the loss reads it: whole along d, its columns split over the tensor axis.

    A vocabulary such as 92,553 divides by nothing, so the columns are filled up with zeros, whose logits the loss leaves
    out. Stored weights, their gradients and the optimizer never see them: the gradient of filling up is cutting off.
    Where there is no tensor axis nothing is filled up. Said once before the loss cuts its slots into chunks: otherwise
    every chunk may gather the kernel again, or add up partial logits of all rows.
    """
    mesh = _mesh()
    if mesh is None:
        return kernel
    ways = mesh.shape.get(TENSOR, 1)
    if ways > 1:
        kernel = jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % math.lcm(VOCABULARY_MULTIPLE, ways))))
    return _constrained(kernel, mesh, None, TENSOR)


def _mesh() -> AbstractMesh | None:
    """The mesh in use, if the partitioner is to divide work among its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


def _constrained(x: jax.Array, mesh: AbstractMesh, *entries: str | tuple[str, ...] | None) -> jax.Array:
    """Axes that the mesh does not have are dropped."""

    def present(entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return tuple(axis for axis in axes if axis in mesh.shape) or None

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(present, entries)))
