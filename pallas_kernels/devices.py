"""The devices that a program is traced for, taken from JAX's current mesh.

The mesh in use is ``jax.sharding.get_abstract_mesh()``, as set by ``jax.set_mesh(mesh)`` or, for absent devices, by
``jax.sharding.use_abstract_mesh(mesh.abstract_mesh)``. It has its axes and the kind of its devices. If there is none,
a program runs on the first local device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec

Axes = tuple[str, ...]

# The chips that XLA calls by another name.
_TPU_KINDS = {"tpu_v5e": "TPU v5 lite", "tpu_v5p": "TPU v5", "tpu_v6e": "TPU v6 lite"}


# ======================================================================================================================
# Which device
# ======================================================================================================================


def device_in_use() -> AbstractDevice | jax.Device:
    """The device that is traced for; it has a ``device_kind`` and a ``platform``."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """The platform that is traced for: "cpu", "gpu" or "tpu"."""
    name = device_in_use().platform
    return {"cuda": "gpu"}.get(name, name)


def lowering_platform(device: jax.Device) -> str:
    """What ``lower(lowering_platforms=...)`` calls the platform of a device, which may be absent."""
    return {"gpu": "cuda"}.get(device.platform, device.platform)


def compiled_for(device: jax.Device, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """The executable of a traced program for a device, or a mesh of its kind, that may be absent.

    Raises what the compiler raises.
    """
    return traced.lower(lowering_platforms=(lowering_platform(device),)).compile()


def device_key(device: AbstractDevice | jax.Device | None = None) -> str:
    """Key of a device's tuning table: "cpu", "tpu_v5e", "nvidia_h200", ...; by default of the device traced for."""
    device = device or device_in_use()
    if device.platform == "cpu":
        return "cpu"
    kind = "_".join(device.device_kind.lower().replace("-", " ").split())
    for key, name in _TPU_KINDS.items():
        if kind == "_".join(name.lower().split()):
            return key
    return kind.replace("_lite", "e")


def is_hopper(device: str) -> bool:
    """Whether the device of a key has compute capability 9.0: H100, H200, H800, GH200."""
    return any(chip in device for chip in ("h100", "h200", "h800"))


def is_hopper_or_later(device: str) -> bool:
    """Whether the device of a key is a Hopper or a Blackwell GPU for data centres."""
    return is_hopper(device) or any(chip in device for chip in ("b100", "b200", "b300"))


def targeting(device: str | jax.Device) -> contextlib.AbstractContextManager[Any]:
    """A context that traces programs for one device that may be absent: a key ("tpu_v5e") or a described device.

    For a mesh of absent devices use ``jax.sharding.use_abstract_mesh(mesh.abstract_mesh)``.
    """
    if isinstance(device, str):
        described = _of_key(device)
    else:
        described = Mesh(np.array([device]), ("device",)).abstract_mesh.abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def _of_key(key: str) -> AbstractDevice:
    vendor, _, chip = key.partition("_")
    platform = {"nvidia": "gpu"}.get(vendor, vendor)
    return AbstractDevice(
        device_kind=_TPU_KINDS.get(key, f"{vendor.upper()} {chip}".strip()), num_cores=None, platform=platform
    )


# ======================================================================================================================
# Which mesh
# ======================================================================================================================


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` run by each device of the mesh in use on its own part of the arguments (``jax.shard_map``).

    Kernels need this, since the partitioner can split only XLA's own operations. If no mesh is in use, or it has only
    one device, or the caller is already inside a ``shard_map``, ``function`` is returned unchanged. Axes that the mesh
    in use does not have are dropped from the specs.

    Args:
      function: of arrays or pytrees of them.
      in_specs: PartitionSpecs, a prefix of the tree of arguments, as for ``jax.shard_map``.
      out_specs: likewise for the result.
    """
    mesh = split_mesh()
    if mesh is None:
        return function

    present = functools.partial(present_axes, mesh)
    specs = jax.tree.map(present, (in_specs, out_specs), is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def present_axes(mesh: AbstractMesh, spec: PartitionSpec) -> PartitionSpec:
    """``spec`` without the axes that ``mesh`` does not have."""
    kept = ([axis for axis in _names(entry) if axis in mesh.shape] for entry in spec)
    return PartitionSpec(*(tuple(axes) or None for axes in kept))


def axis_that_splits(size: int, axis: str | None) -> str | None:
    """The axis if the mesh in use has it and it divides ``size``; otherwise None: not split."""
    mesh = split_mesh()
    return axis if mesh is not None and axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def devices_along(axis: str | None) -> int:
    """The number of devices of the mesh in use along ``axis``; 1 if the mesh does not have it."""
    mesh = split_mesh()
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def split_mesh() -> AbstractMesh | None:
    """The mesh in use, if work remains to be divided among its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
