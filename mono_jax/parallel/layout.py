"""Which devices lie beside each other on the mesh, and how many of them share the parameters where nobody says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from mono_jax.errors import ConfigError

STATE_SHARE = 1 / 8  # of a device's memory: activations of long rows want most of it


def fsdp_for(state_bytes: float, devices: int, memory: int | None) -> int:
    """The least power of two that divides ``devices`` with which the state takes ``STATE_SHARE`` of ``memory``.

    More shards than that gather as many bytes through more devices, and leave slivers of each kernel; the rest of the
    devices copy the state (``data``). All of them, if the share is not reached; 1, if the memory is not known. The 2B
    model gets 16 to 32 on v5e, 4 to 8 on H100.
    """
    if memory is None:
        return 1
    shards = 1
    while state_bytes / shards > STATE_SHARE * memory and devices % (2 * shards) == 0:
        shards *= 2
    return shards


def arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """``devices`` as an array of ``sizes``, later axes along faster links.

    Within a slice of TPUs axes follow the torus. Where there are several slices or, for GPUs, several machines, the
    first axis that they divide spans them (``data`` before ``fsdp`` before ``tensor``); if none is, the first axes
    share them, as 16 x 16 on 32 machines of 8: 16 of ``data`` times 2 of ``fsdp``. Raises ConfigError if neither goes.
    """
    by_process = devices[0].platform == "gpu"
    of = "process_index" if by_process else "slice_index"
    parts = len({getattr(device, of, 0) for device in devices})
    if parts == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = _across(sizes, parts)
    if math.prod(outer) != parts or len(devices) % parts:
        raise ConfigError(
            f"mesh {' x '.join(map(str, sizes))} over {parts} {'machines' if by_process else 'slices'}: one axis must "
            "be a multiple of them, or several must share them: change config.mesh"
        )
    inner = [size // whole for size, whole in zip(sizes, outer, strict=True)]
    assert math.prod(inner) * parts == len(devices)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _across(sizes: Sequence[int], parts: int) -> list[int]:
    """How many of ``parts`` machines or slices each axis spans; their product is less where they cannot be divided."""
    one = next((place for place, size in enumerate(sizes) if size % parts == 0), None)
    if one is not None:
        return [parts if place == one else 1 for place in range(len(sizes))]
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, parts))
        parts //= outer[-1]
    return outer
