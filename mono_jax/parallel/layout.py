"""Which devices are neighbours on the mesh, and how many of them shard the parameters by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from mono_jax.errors import ConfigError

STATE_SHARE = 1 / 8  # of a device's memory: activations of long rows need most of it


def fsdp_for(state_bytes: float, devices: int, memory: int | None) -> int:
    """The smallest power of two that divides ``devices`` and at which the state takes at most ``STATE_SHARE`` of
    ``memory``.

    More shards would gather the same number of bytes through more devices and leave only slivers of each kernel; the
    remaining devices replicate the state (``data``). If no number of shards reaches the share, the result is the
    largest such power of two; if the memory is unknown, it is 1. The 2B model gets 16 to 32 on v5e, 4 to 8 on H100.
    """
    if memory is None:
        return 1
    shards = 1
    while state_bytes / shards > STATE_SHARE * memory and devices % (2 * shards) == 0:
        shards *= 2
    return shards


def arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """``devices`` as an array of shape ``sizes``, with later axes along faster links.

    Within a TPU slice, axes follow the torus. With several slices or, for GPUs, several machines, the first axis whose
    size is a multiple of their number spans them (``data`` before ``fsdp`` before ``tensor``). If there is none, the
    first axes share them: a 16 x 16 mesh on 32 machines with 8 devices each gets 16 of ``data`` times 2 of ``fsdp``.
    Raises ConfigError if neither works.
    """
    by_process = devices[0].platform == "gpu"
    of = "process_index" if by_process else "slice_index"
    parts = len({getattr(device, of, 0) for device in devices})
    if parts == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = _across(sizes, parts)
    if math.prod(outer) != parts or len(devices) % parts:
        raise ConfigError(
            f"mesh {' x '.join(map(str, sizes))} over {parts} {'machines' if by_process else 'slices'}: the size of "
            "one axis must be a multiple of their number, or several axes must share them: change config.mesh"
        )
    inner = [size // whole for size, whole in zip(sizes, outer, strict=True)]
    assert math.prod(inner) * parts == len(devices)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _across(sizes: Sequence[int], parts: int) -> list[int]:
    """How many of ``parts`` machines or slices each axis spans; their product is smaller if they cannot be divided."""
    one = next((place for place, size in enumerate(sizes) if size % parts == 0), None)
    if one is not None:
        return [parts if place == one else 1 for place in range(len(sizes))]
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, parts))
        parts //= outer[-1]
    return outer
