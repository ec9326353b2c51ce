"""The loss of each sample of packed batches, with the same sums that training minimises."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.batch import boundaries
from mono_jax import tree
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import on_mesh
from mono_jax.parallel.rows import LocalRows
from mono_jax.training.step import slot_losses

SCORES = ("loss", "tokens", "sight")  # of a sample under a model, see ``runs.scoring``


class SampleLosses:
    """Losses of the samples in batches of ``batch_size`` rows; compiled on the first call.

    params: on ``mesh``, all of whose devices belong to this process.
    """

    def __init__(self, model: Model, params: tree.Tree, dtype: jnp.dtype, mesh: Mesh, batch_size: int):
        def losses(params: tree.Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
            return slot_losses(model, params, {}, batch, dtype)

        whole = NamedSharding(mesh, PartitionSpec())
        self._losses = jax.jit(on_mesh(model.execution.with_products(losses), mesh), out_shardings=whole)
        self._params, self._rows = params, LocalRows(mesh, batch_size)

    def __call__(self, batch: Mapping[str, np.ndarray], samples: int) -> np.ndarray:
        """Sum of the weighted losses (nats) of each row's samples: float64 [B, samples], 0 where there is none."""
        return by_sample(batch, jax.device_get(self._losses(self._params, self._rows.put(batch))), samples)


def by_sample(batch: Mapping[str, np.ndarray], values: np.ndarray, samples: int) -> np.ndarray:
    """The sums of ``values`` [B, T] of text slots over each row's samples: float64 [B, samples]."""
    slots, segments = batch["order"] - boundaries(batch)[:, None], batch["segments"]
    row, place = np.nonzero((slots >= 0) & (segments > 0))
    number = row * samples + segments[row, place] - 1
    sums = np.bincount(number, values[row, slots[row, place]], minlength=len(values) * samples)
    return sums.reshape(len(values), samples)
