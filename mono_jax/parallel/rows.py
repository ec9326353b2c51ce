"""Rows of the global batch: which ones a process makes follows from the sharding, never from its number."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mono_jax.parallel.mesh import BATCH


class LocalRows:
    """The rows of a global batch of ``batch_size`` rows that the devices of this process hold.

    Attributes:
      numbers: rows of the global batch, ascending. Processes that share rows (``tensor`` spans them) all make them.
      counted: bool [len(numbers)], True where this is the first process that holds a row: in sums over processes
        every row counts once.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._sharding, self._batch_size = NamedSharding(mesh, BATCH), batch_size
        holders = np.full(batch_size, np.iinfo(np.int32).max)
        local = np.zeros(batch_size, bool)
        for device, index in self._sharding.devices_indices_map((batch_size,)).items():
            holders[index] = np.minimum(holders[index], device.process_index)
            local[index] |= device.process_index == jax.process_index()
        self.numbers = np.flatnonzero(local).tolist()
        self.counted = holders[self.numbers] == jax.process_index()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch on the mesh; ``batch`` holds rows ``numbers`` of it, [len(numbers), ...]."""
        return {name: self._global(array) for name, array in batch.items()}

    def _global(self, array: np.ndarray) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch_size)
            first = int(np.searchsorted(self.numbers, start))
            return array[(slice(first, first + stop - start), *index[1:])]

        shape = (self._batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, of_device)
