"""The device mesh: its axes, and functions on it.

Axes: ``data`` (rows of the batch), ``fsdp`` (rows and parameters), ``tensor`` (heads and FFN columns). The mesh in
use while a function is traced is JAX's own (``jax.sharding.use_abstract_mesh``); its devices may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mono_jax.axes import AXES, ROWS
from mono_jax.errors import ConfigError
from mono_jax.parallel.mesh_config import MeshConfig

BATCH = PartitionSpec(ROWS)


def make_mesh(config: MeshConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """Raises ConfigError if the axes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config or MeshConfig(), axis) for axis in AXES]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known else 0
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        axes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        raise ConfigError(f"mesh {axes} does not fit {len(devices)} devices: change config.mesh")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``function``, traced for ``mesh``: kernels are chosen for its devices, and run on each one's own part."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
