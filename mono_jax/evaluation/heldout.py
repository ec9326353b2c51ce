"""Held-out loss by source and modality, with the same sums that training minimises."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.batch import Batch, boundaries
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, StorageError
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.strict import to_dict
from mono_jax import tree
from mono_jax.evaluation.blind import Blindness, blinded
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.parallel.agreement import first_process_first, gathered, together
from mono_jax.parallel.mesh import on_mesh
from mono_jax.parallel.rows import LocalRows
from mono_jax.training.metrics import Say
from mono_jax.training.step import slot_losses, sums_by_source

# A token counts as "image" if an image precedes it in its sample, and as "text" if none does.
MODALITIES = ("text", "image")


@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over held-out tokens by modality: cross entropy (nats) times weight, and the weights."""

    sums: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def mean(self) -> float:
        """nan if there are no trained tokens."""
        weight = sum(self.weights.values())
        return sum(self.sums.values()) / weight if weight else float("nan")

    def by_modality(self) -> dict[str, float]:
        """The mean for each modality that has tokens."""
        return {name: self.sums[name] / weight for name, weight in self.weights.items() if weight}

    @classmethod
    def of_all(cls, losses: Iterable[Loss]) -> Loss:
        """The sums over several sources."""
        losses = list(losses)
        add = lambda field: {name: sum(getattr(loss, field)[name] for loss in losses) for name in MODALITIES}  # noqa: E731
        return cls(add("sums"), add("weights"))


def with_modalities(batch: Mapping[str, np.ndarray]) -> Batch:
    """The batch with the field "sources" (see ``BatchSpec``) set to the index in ``MODALITIES``, or 0 in padding."""
    order, segments = batch["order"], batch["segments"]
    rows, sequence = order.shape
    ends = boundaries(batch)[:, None]
    visual = (order < ends) & (segments > 0)
    before = np.concatenate([np.zeros((rows, 1), np.int64), np.cumsum(visual, axis=1)], axis=1)
    first = np.clip(np.arange(sequence) - batch["positions"], 0, None)  # where each token's sample begins
    seen = before[:, 1:] > np.take_along_axis(before, first, axis=1)
    kinds = np.zeros(batch["tokens"].shape, np.int32)
    text = ~visual & (segments > 0)
    row, place = np.nonzero(text)
    kinds[row, (order - ends)[row, place]] = 1 + seen[row, place]
    return {**batch, "sources": kinds}


class HeldoutLoss:
    """Sums of the loss over batches, with the weights that these contain; compiled on the first call.

    The same parameters give the same float, bit for bit. ``mesh``: where the parameters are; None = anywhere.
    """

    def __init__(self, model: Model, dtype: jnp.dtype = jnp.bfloat16, mesh: Mesh | None = None):
        def sums(trainable: tree.Tree, frozen: tree.Tree, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
            return sums_by_source(slot_losses(model, trainable, frozen, batch, dtype), batch, MODALITIES)

        sums = model.execution.with_products(sums)
        if mesh is None:
            self._sums = jax.jit(sums)
        else:
            self._sums = jax.jit(on_mesh(sums, mesh), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, trainable: tree.Tree, frozen: tree.Tree, batches: Iterable[Mapping[str, Any]]) -> Loss:
        """The loss on batches ``with_modalities``."""
        parts = [jax.device_get(self._sums(trainable, frozen, batch)) for batch in batches]

        def total(kind: str) -> dict[str, float]:
            return {name: float(np.sum([p[f"{kind}/{name}"] for p in parts], dtype=np.float64)) for name in MODALITIES}

        return Loss(total("loss_sum"), total("weight"))


class HeldoutSources:
    """The losses on named sources, each of which has its own rows.

    Attributes:
      identities: {name: hash of everything that determines the source's batches}.
    """

    def __init__(
        self,
        data: DataConfig,
        sources: Mapping[str, Any],
        batches: int | None,
        model: Model,
        dtype: jnp.dtype,
        mesh: Mesh,
        cache: Path,
        say: Say = print,
        blind: Sequence[Blindness] = (),
    ):
        """``data``: of the rows; ``sources``: {name: spec, or path of a text file}; ``batches``: maximum per source.

        ``blind``: how images are replaced for additional losses, besides those of the unchanged sources.

        Raises DataError.
        """
        self._loss, self._batches, self._say = HeldoutLoss(model, dtype, mesh), batches, say
        self._blind = tuple(blind)
        self._rows = LocalRows(mesh, data.batch_size)
        with first_process_first():  # which does the counting; the others then find the result in the cache
            self._data = {name: _opened(data, name, spec, model.config, cache) for name, spec in sources.items()}
        self.identities = {name: f"{opened.identity}/{batches}" for name, opened in self._data.items()}
        self._told: set[str] = set()

    def __call__(self, trainable: tree.Tree, frozen: tree.Tree) -> dict[str, Loss]:
        """{name: loss}. Bad samples are skipped and reported. Raises StorageError; DataError if no sample is left."""
        return {name: self._measure(name, trainable, frozen) for name in self._data}

    def blind(self, trainable: tree.Tree, frozen: tree.Tree, seeing: Mapping[str, Loss]) -> dict[str, dict[str, Loss]]:
        """{name: {blindness: loss}} for the sources with images, according to their losses ``seeing``."""
        return {
            name: {blindness: self._sum(name, trainable, frozen, blindness) for blindness in self._blind}
            for name, loss in seeing.items()
            if self._blind and loss.weights["image"]
        }

    def _sum(self, name: str, trainable: tree.Tree, frozen: tree.Tree, blindness: Blindness | None = None) -> Loss:
        errors: list[Exception] = []
        with together():
            loss = self._loss(trainable, frozen, self._read(self._data[name], errors, blindness))
            if errors:
                raise errors[0]
        return loss

    def _measure(self, name: str, trainable: tree.Tree, frozen: tree.Tree) -> Loss:
        data, loss = self._data[name], self._sum(name, trainable, frozen)
        if name not in self._told:
            self._told.add(name)
            self._name_bad(name, data)
        if not sum(loss.weights.values()):
            raise DataError(
                f"config.evaluation.sources.{name}: no token is left to measure the loss on: all samples are bad, too "
                "long for a row, or without an answer (see the line above)"
            )
        return loss

    def _name_bad(self, name: str, data: PackedData) -> None:
        """Logs a line about the skipped samples; every process that builds the row has encountered each of them."""
        found = [sample for of_process in gathered(data.report.bad) for sample in of_process]
        bad = {key: (reason, detail) for key, reason, detail in found}
        if bad:
            shown = ", ".join(f"{key}: {' '.join(filter(None, why))}" for key, why in list(bad.items())[:5])
            self._say(f"held-out {name}: {len(bad)} samples are skipped: {shown}{', ...' if len(bad) > 5 else ''}")

    def _read(
        self, data: PackedData, errors: list[Exception], blindness: Blindness | None = None
    ) -> Iterator[Mapping[str, Any]]:
        """If one of several processes cannot read, it takes part with empty batches, since the others wait for it."""
        number = 0
        try:
            with contextlib.closing(data.iterate(0, self._rows.numbers)) as batches:
                for number, batch in itertools.islice(batches, self._batches):
                    batch = batch if blindness is None else blinded(batch, blindness)
                    yield self._rows.put(with_modalities(batch))
                    number += 1
        except Exception as error:
            if jax.process_count() == 1:
                raise
            errors.append(error)
            empty = self._rows.put(with_modalities(data.spec.empty(len(self._rows.numbers))))
            for _ in range(number, min(data.steps_per_epoch(), self._batches or sys.maxsize)):
                yield empty


def _opened(data: DataConfig, name: str, spec: Any, config: Architecture, cache: Path) -> PackedData:
    spec = {"kind": "text", "paths": spec} if isinstance(spec, str) else spec
    values = to_dict(data) | {"sources": [{"name": name, "spec": spec}], "epochs": 1, "shuffle": "none", "seed": 0}
    values |= {"workers": 0, "jpeg_augment": False, "source_ids": False}
    values |= (
        {"pixel_path": "exact"} if data.pixel_path == "device" else {}
    )  # the same bytes; pictures are replaced here
    try:
        return PackedData(DataConfig.from_dict(values), cache, config.geometry)
    except StorageError:
        raise
    except DataError as error:
        raise DataError(f"config.evaluation.sources.{name}: {error}") from None
