"""Arrays of any kind on the host, slice by slice, for hashing and writing files.

An array that is distributed over the devices of several processes is gathered slice by slice, by all of them together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax.weights.names import is_stacked

CHUNK = 256 << 20  # bytes


def is_spread(leaf: Any) -> bool:
    """Whether ``leaf`` is on the devices of several processes, none of which has all of it."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated


def slice_rows(path: str, leaf: Any) -> int:
    """Rows of a slice: one layer; without layers, as many as fit into ``CHUNK``, in slices of equal size."""
    if is_stacked(path) or not leaf.shape:
        return 1
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return math.ceil(leaf.shape[0] / max(math.ceil(size / CHUNK), 1))


def slices(path: str, leaf: Any) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, values) of an array (also a ``LazyArray``) in order; () and a scalar's value for a scalar.

    An array in one piece without layers is returned whole. All processes call this if ``is_spread``.
    """
    rows, step = leaf.shape[0] if leaf.shape else 0, slice_rows(path, leaf)
    if is_spread(leaf):
        for start in range(0, rows, step):
            size = min(step, rows - start)
            yield slice(start, start + size), np.asarray(_gather(leaf.sharding.mesh)(leaf, start, size=size))
    elif is_stacked(path):
        for n in range(rows):
            yield slice(n, n + 1), np.asarray(leaf[n])[None]
    else:
        yield slice(0, rows) if leaf.shape else (), np.asarray(leaf)


@functools.lru_cache
def _gather(mesh: Mesh) -> Any:
    """(array, start, size=...) -> its rows [start, start + size), on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, axis=0)
    return jax.jit(lambda a, start, size: rows(a, start, size), static_argnames="size", out_shardings=whole)
