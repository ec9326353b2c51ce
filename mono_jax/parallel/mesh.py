"""The device mesh: its axes, and functions that run on it.

Axes: ``data`` (rows of the batch), ``fsdp`` (rows and parameters), ``context`` (slots of a row and parameters),
``tensor`` (heads and FFN columns). The mesh in use while a function is traced is JAX's own
(``jax.sharding.use_abstract_mesh``); its devices may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from mono_jax.axes import AXES, CONTEXT, DATA, FSDP, ROWS
from mono_jax.errors import ConfigError
from mono_jax.parallel.layout import arranged, fsdp_for
from mono_jax.parallel.mesh_config import MeshConfig

BATCH = PartitionSpec(ROWS)
# Fields of a batch with a column for each visual or text slot, which ``context`` splits; other fields describe whole
# rows.
OF_SLOTS = ("patches", "patch_cells", "tokens", "targets", "loss_weights", "sources")


def make_mesh(
    config: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    state_bytes: float = 0,
    memory: int | None = None,
) -> Mesh:
    """The mesh of ``config`` over ``devices`` (default: ``jax.devices()``), with neighbours along its inner axes.

    If the config leaves ``fsdp`` open, it follows from ``state_bytes`` (parameters, gradients and optimizer state over
    all devices) and the ``memory`` of one device. Raises ConfigError if the axes do not multiply to the number of
    devices.
    """
    config, devices = config or MeshConfig(), list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if sizes[FSDP] is None:
        others = math.prod(size for axis, size in sizes.items() if axis not in ROWS)
        free = len(devices) // others if others > 0 else 1
        held = state_bytes / max(sizes[CONTEXT], 1)
        sizes[FSDP] = fsdp_for(held, free, memory) if sizes[DATA] == -1 else -1
    if (open_axis := next((axis for axis, size in sizes.items() if size == -1), None)) is not None:
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes[open_axis] = len(devices) // known if known else 0
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"mesh {axes} does not fit {len(devices)} devices: change config.mesh")
    return Mesh(arranged(tuple(sizes.values()), devices), AXES)


def row_ways(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def unshared(mesh: Mesh) -> Mesh:
    """The same devices for rows that need not be shared: those along ``context`` take their own rows.

    Parameters have the same layout as on ``mesh``.
    """
    sizes = dict(mesh.shape) | {FSDP: mesh.shape[FSDP] * mesh.shape[CONTEXT], CONTEXT: 1}
    return Mesh(mesh.devices.reshape(*sizes.values()), AXES)


def batch_spec(field: str) -> PartitionSpec:
    """How a field of a batch is sharded over a mesh."""
    return PartitionSpec(ROWS, CONTEXT) if field in OF_SLOTS else BATCH


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``function``, traced for ``mesh``: kernels are chosen for its devices, and run on each device's own shard."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
