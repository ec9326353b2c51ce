"""Held-out loss: what retention of the language ability is measured with, and which checkpoint is the best."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.config import DataConfig
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.strict import to_dict
from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.parallel.agreement import first_process_first, together
from mono_jax.parallel.mesh import on_mesh
from mono_jax.parallel.rows import LocalRows
from mono_jax.training.step import loss_sum


class HeldoutLoss:
    """Mean cross entropy (nats) per trained token, weighted as the batches say; compiled when it is first called.

    The same parameters give the same float to the last bit. ``mesh``: where the parameters are; None = wherever.
    """

    def __init__(self, model: Model, dtype: jnp.dtype = jnp.bfloat16, mesh: Mesh | None = None):
        def sums(
            trainable: tree.Tree, frozen: tree.Tree, batch: Mapping[str, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return loss_sum(model, trainable, frozen, batch, dtype), batch["loss_weights"].sum()

        if mesh is None:
            self._sums = jax.jit(sums)
        else:
            self._sums = jax.jit(on_mesh(sums, mesh), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, trainable: tree.Tree, frozen: tree.Tree, batches: Iterable[Mapping[str, Any]]) -> float:
        """nan if no token is trained on."""
        parts = [jax.device_get(self._sums(trainable, frozen, batch)) for batch in batches]
        loss, weight = (float(np.sum([part[i] for part in parts], dtype=np.float64)) for i in range(2))
        return loss / weight if weight else float("nan")


class HeldoutSources:
    """The losses on named sources, in rows like those of a run's ``data``."""

    def __init__(
        self,
        data: DataConfig,
        sources: Mapping[str, Any],
        batches: int | None,
        model: Model,
        dtype: jnp.dtype,
        mesh: Mesh,
        cache: Path,
    ):
        """``sources``: {name: spec, or path of a text file}; ``batches``: of each at most. Raises DataError."""
        self._loss, self._batches = HeldoutLoss(model, dtype, mesh), batches
        self._rows = LocalRows(mesh, data.batch_size)
        with first_process_first():  # which counts what the others then find in the cache
            self._data = {name: _opened(data, name, spec, model.config, cache) for name, spec in sources.items()}

    def __call__(self, trainable: tree.Tree, frozen: tree.Tree) -> dict[str, float]:
        """{"heldout/NAME": loss}. Raises StorageError."""
        return {f"heldout/{name}": self._measure(trainable, frozen, data) for name, data in self._data.items()}

    def _measure(self, trainable: tree.Tree, frozen: tree.Tree, data: PackedData) -> float:
        errors: list[Exception] = []
        with together():
            loss = self._loss(trainable, frozen, self._read(data, errors))
            if errors:
                raise errors[0]
        return loss

    def _read(self, data: PackedData, errors: list[Exception]) -> Iterable[Mapping[str, Any]]:
        """One of several processes that cannot read takes part with empty batches, since the others wait for it."""
        number = 0
        try:
            with contextlib.closing(data.iterate(0, self._rows.numbers)) as batches:
                for number, batch in itertools.islice(batches, self._batches):
                    yield self._rows.put(batch)
                    number += 1
        except Exception as error:
            if jax.process_count() == 1:
                raise
            errors.append(error)
            empty = self._rows.put(data.spec.empty(len(self._rows.numbers)))
            for _ in range(number, min(data.steps_per_epoch(), self._batches or sys.maxsize)):
                yield empty


def _opened(data: DataConfig, name: str, spec: Any, config: Architecture, cache: Path) -> PackedData:
    spec = {"kind": "text", "paths": spec} if isinstance(spec, str) else spec
    values = to_dict(data) | {"sources": [{"name": name, "spec": spec}], "epochs": 1, "shuffle": "none", "seed": 0}
    values |= {"workers": 0, "jpeg_augment": False}
    return PackedData(DataConfig.from_dict(values), cache, config.geometry)
