"""The global batch on a mesh: which rows a process makes, and which of their columns each device gets, follow from the
sharding, never from a process's index.

Devices along ``context`` share rows. Each gets two runs of a row's visual slots and two of its text slots, so that each
has about the same number of query-key pairs to compute, although a token of a long sample sees only those before it:

    visual slots, context 2     | 0 | 1 | 2 | 3 |     device 0 gets 0 and 3, device 1 gets 1 and 2

Within a modality, slots may be in any order, since a batch's ``order`` says how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data_pipelines.batch import Batch
from mono_jax.axes import CONTEXT
from mono_jax.errors import ConfigError
from mono_jax.parallel.crops import WHOLE_ROWS, with_patches
from mono_jax.parallel.mesh import BATCH, OF_SLOTS, batch_spec


class LocalRows:
    """The rows of a global batch of ``batch_size`` rows that the devices of this process hold.

    Attributes:
      numbers: rows of the global batch, ascending. Processes that share rows (because ``tensor`` or ``context`` spans
        them) all make these rows in full.
      counted: bool [len(numbers)], True if this is the first process that holds the row, so that every row counts once
        in sums over processes.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._mesh, self._batch_size = mesh, batch_size
        holders = np.full(batch_size, np.iinfo(np.int32).max)
        local = np.zeros(batch_size, bool)
        for device, index in NamedSharding(mesh, BATCH).devices_indices_map((batch_size,)).items():
            holders[index] = np.minimum(holders[index], device.process_index)
            local[index] |= device.process_index == jax.process_index()
        self.numbers = np.flatnonzero(local).tolist()
        self.counted = holders[self.numbers] == jax.process_index()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch on the mesh; ``batch`` holds rows ``numbers`` of it, [len(numbers), ...]."""
        ways = self._mesh.shape[CONTEXT]
        if ways > 1 and "crop_pixels" in batch:
            raise ConfigError(WHOLE_ROWS)
        batch = reordered(batch, ways) if ways > 1 else batch
        return with_patches({name: self._global(name, array, ways) for name, array in batch.items()}, self._mesh)

    def _global(self, name: str, array: np.ndarray, ways: int) -> jax.Array:
        columns = dealt(array.shape[1], ways) if ways > 1 and name in OF_SLOTS else None

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch_size)
            first = int(np.searchsorted(self.numbers, start))
            rows = array[first : first + stop - start]
            return rows[(slice(None), *index[1:])] if columns is None else rows[:, columns[index[1]]]

        shape = (self._batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(self._mesh, batch_spec(name)), of_device)


def dealt(slots: int, ways: int) -> np.ndarray:
    """int [slots]: the slots in the order in which ``ways`` devices get them; ``slots`` must be a multiple of 2 *
    ways."""
    runs = np.arange(slots).reshape(2 * ways, -1)
    return np.stack([runs[:ways], runs[: ways - 1 : -1]], axis=1).reshape(-1)


def reordered(batch: Mapping[str, np.ndarray], ways: int) -> Batch:
    """The batch with the ``order`` that it has once its columns are ``dealt``; the columns themselves are not moved."""
    visual, text = batch["patch_cells"].shape[1], batch["tokens"].shape[1]
    places = np.empty(visual + text, batch["order"].dtype)  # of each slot, once dealt
    places[np.concatenate([dealt(visual, ways), visual + dealt(text, ways)])] = np.arange(visual + text)
    return {**batch, "order": places[batch["order"]]}
