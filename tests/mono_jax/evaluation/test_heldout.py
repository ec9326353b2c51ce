"""Held-out sums by modality: over the right tokens, and equal on any mesh."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import BatchSpec, ragged
from mono_jax.evaluation.heldout import HeldoutLoss, Loss, with_modalities
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.rows import LocalRows
from mono_jax.parallel.specs import param_shardings
from mono_jax.training.step import loss_sum
from tests.mono_jax.helpers import random_batch, random_params
from tests.mono_jax.training.test_meshes import mesh_of

CONFIG = preset("tiny_mono")


def mixed_batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of several samples with runs of text and images in any order, and padding; weights like 1/sqrt(n)."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rows)  # pixels and ids
    spec = BatchSpec(16, 16, 8)
    for row in range(rows):
        kinds = rng.permutation([0] * 13 + [1] * 11)  # 1 = visual
        slots = np.where(kinds == 1, np.cumsum(kinds) - 1, 16 + np.cumsum(1 - kinds) - 1)
        batch["order"][row] = np.concatenate([slots, np.setdiff1d(np.arange(spec.sequence), slots)])
        starts = np.sort(rng.choice(np.arange(1, 24), 3, replace=False))
        segments = np.searchsorted(starts, np.arange(24), side="right") + 1
        batch["segments"][row] = np.concatenate([segments, np.zeros(8, int)])
        first = np.concatenate([[0], starts])[segments - 1]
        batch["positions"][row] = np.concatenate([np.arange(24) - first, np.zeros(8, int)])
    batch["loss_weights"][:] = rng.random(batch["loss_weights"].shape) * (rng.random((rows, 16)) < 0.6)
    batch["loss_weights"][:, 13:] = 0
    return batch


def one_by_one(batch: dict[str, np.ndarray]) -> np.ndarray:
    """The kinds by definition: 2 after a visual token of the same sample, 1 elsewhere, 0 for padding."""
    visual = batch["patch_cells"].shape[1]
    kinds = np.zeros(batch["tokens"].shape, int)
    for row, (order, segments) in enumerate(zip(batch["order"], batch["segments"])):
        end = batch["visual_slots"][row] if "visual_slots" in batch else visual
        for place, slot in enumerate(order):
            if segments[place] and slot >= end:
                before = order[:place][segments[:place] == segments[place]]
                kinds[row, slot - end] = 2 if (before < end).any() else 1
    return kinds


def test_a_token_is_of_an_image_if_one_stands_before_it_in_its_sample():
    for seed in range(20):
        batch = mixed_batch(3, seed)
        np.testing.assert_array_equal(with_modalities(batch)["sources"], one_by_one(batch))
        packed = ragged(batch, 32, 8)
        np.testing.assert_array_equal(with_modalities(packed)["sources"], one_by_one(packed))
    empty = BatchSpec(16, 16, 8).empty(2)
    assert not with_modalities(empty)["sources"].any()


def measured(axes: tuple[int, ...]) -> Loss:
    mesh = mesh_of(*axes)
    params = random_params(CONFIG)
    placed = jax.device_put(params, param_shardings(CONFIG, params, mesh))
    rows = LocalRows(mesh, 8)
    loss = HeldoutLoss(Model(CONFIG, Execution(attention="xla", loss_chunk=5)), jnp.float32, mesh)
    return loss(placed, {}, (rows.put(with_modalities(batch)) for batch in batches()))


def batches() -> list[dict[str, Any]]:
    """The last one is half empty, as at the end of a source."""
    last = mixed_batch(8, 2)
    for name, array in BatchSpec(16, 16, 8).empty(8).items():
        last[name][4:] = array[4:]
    return [mixed_batch(8, 1), last]


@cache
def expected() -> Loss:
    """From the training loss of batches in which all other tokens have weight zero."""
    model, params = Model(CONFIG, Execution(attention="xla")), random_params(CONFIG)
    total = jax.jit(lambda batch: loss_sum(model, params, {}, batch, jnp.float32))
    sums, weights = {"text": 0.0, "image": 0.0}, {"text": 0.0, "image": 0.0}
    for batch in batches():
        for number, name in enumerate(("text", "image"), 1):
            own = np.where(one_by_one(batch) == number, batch["loss_weights"], 0)
            sums[name] += float(total(batch | {"loss_weights": own}))
            weights[name] += float(own.sum(dtype=np.float64))
    return Loss(sums, weights)


@pytest.mark.parametrize("axes", [(1,), (8,), (1, 8), (2, 2, 2), (1, 2, 1, 4)], ids=str)
def test_the_sums_are_those_of_training_on_any_mesh(axes: tuple[int, ...]):
    found = measured(axes)
    assert found.sums == pytest.approx(expected().sums, rel=2e-6)
    assert found.weights == pytest.approx(expected().weights, rel=1e-6)
    assert found.mean == pytest.approx(expected().mean, rel=2e-6)
    both = Loss.of_all([found, found])
    assert both.by_modality() == pytest.approx(found.by_modality(), rel=1e-12) and both.mean == pytest.approx(
        found.mean
    )
