"""Small parameters joined into few arrays, since each array that a program is passed costs the host time at every
call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax import tree
from mono_jax.models.transformer import Params

SMALL = 1 << 16  # bytes: copying this much out of a bundle at every call is nothing beside a step

_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)  # kernels may be kept in another form (``Transposed``)


class Bundle(NamedTuple):
    """Parameters as a program is passed them. large: arrays as they are; small: by dtype, all the others in a row."""

    large: Params
    small: dict[str, jax.Array]


class Bundles:
    """Which of ``params`` are joined, in which order; one of each dtype stays as it is."""

    def __init__(self, params: Params):
        flat = tree.flatten(params)
        of_dtype: dict[str, dict[str, tuple[int, ...]]] = {}
        for path, leaf in flat.items():
            if isinstance(leaf, _ARRAYS) and leaf.size * leaf.dtype.itemsize <= SMALL:
                of_dtype.setdefault(leaf.dtype.name, {})[path] = leaf.shape
        self._shapes = {name: shapes for name, shapes in of_dtype.items() if len(shapes) > 1}

    def packed(self, params: Params) -> Bundle:
        """``params`` may be shapes (``jax.ShapeDtypeStruct``)."""
        flat = tree.flatten(params)
        small = {name: _joined([flat.pop(path) for path in shapes]) for name, shapes in self._shapes.items()}
        return Bundle(tree.unflatten(flat), small)

    def unpacked(self, bundle: Bundle) -> Params:
        """The parameters that were packed; inside a program."""
        parts = [_parts(bundle.small[name], shapes) for name, shapes in self._shapes.items()]
        return tree.merge(bundle.large, *map(tree.unflatten, parts))


def _joined(arrays: list[Any]) -> Any:
    def join(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate([array.ravel() for array in arrays])

    return jax.eval_shape(join, *arrays) if isinstance(arrays[0], jax.ShapeDtypeStruct) else join(*arrays)


def _parts(joined: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    ends = itertools.accumulate(math.prod(shape) for shape in shapes.values())
    parts = jnp.split(joined, list(ends)[:-1])
    return {path: part.reshape(shape) for part, (path, shape) in zip(parts, shapes.items())}
