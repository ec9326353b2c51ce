"""Native resolution: positions of any grid, against tiles of that size; the rest of the model is unaffected."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import native_cells, of_native_cells
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.models.vision import bicubic_matrix, cell_embedding, native_embedding
from tests.mono_jax.helpers import random_batch, random_params

VISION = VisionConfig(hidden_size=6, patch_size=4, image_size=32)  # 8 x 8 patches, 4 x 4 tokens
TABLE = np.random.default_rng(0).normal(size=(65, 6)).astype(np.float32)


@pytest.mark.parametrize("edge", [1, 9])
def test_a_square_image_has_the_positions_of_a_tile_of_its_size(edge: int):
    of_tile = cell_embedding(TABLE, dataclasses.replace(VISION, tile_size=8 * edge))
    found = native_embedding(TABLE, jnp.asarray(native_cells(edge, edge))[None], VISION)[0]
    np.testing.assert_allclose(found, of_tile, atol=2e-6)


def test_any_grid_is_interpolated_along_each_side():
    """Several images in a row, compared with the separable interpolation of each."""
    grids = [(3, 2), (1, 7), (200, 1)]
    cells = np.concatenate([native_cells(columns, rows) for columns, rows in grids])
    found = np.asarray(jax.jit(lambda t: native_embedding(t, jnp.asarray(cells)[None], VISION))(TABLE))[0]
    start = 0
    for columns, rows in grids:
        down, across = bicubic_matrix(2 * rows, 8), bicubic_matrix(2 * columns, 8)
        whole = np.einsum("yi,xj,ijc->yxc", down, across, TABLE[1:].reshape(8, 8, 6))
        expected = whole.reshape(rows, 2, columns, 2, 6).transpose(0, 2, 1, 3, 4).reshape(rows * columns, 4, 6)
        np.testing.assert_allclose(found[start : start + len(expected)], expected, atol=5e-6)
        start += len(expected)


@pytest.mark.parametrize("grid", [(256, 256), (1, 256), (7, 5)])
def test_cells_say_place_and_grid(grid: tuple[int, int]):
    columns, rows = grid
    row, column, all_rows, all_columns = of_native_cells(native_cells(columns, rows))
    assert {*all_rows.tolist()} == {rows} and {*all_columns.tolist()} == {columns}
    np.testing.assert_array_equal(row * columns + column, np.arange(rows * columns))
    on_device = of_native_cells(jnp.asarray(native_cells(columns, rows)))
    np.testing.assert_array_equal(np.stack(on_device), [row, column, all_rows, all_columns])


def test_a_model_computes_what_it_does_with_tiles_and_learns_positions():
    """Images of 4 x 4 tokens, one tile each: hidden states and gradients are those of the tiled model."""
    tiled = preset("tiny_mono")
    native = tiled.replace(vision=dataclasses.replace(tiled.vision, native=True))
    batch, params = random_batch(2), random_params(tiled)
    batch_native = batch | {"patch_cells": native_cells(4, 4)[batch["patch_cells"]]}

    def hidden_and_gradient(config: Architecture, batch: dict) -> tuple:
        model = Model(config, Execution(attention="xla"))
        run = lambda p: jnp.square(model(p, batch, jnp.float32).hidden).sum()  # noqa: E731
        return jax.device_get(jax.jit(jax.value_and_grad(run))(params))

    expected, of_tiles = hidden_and_gradient(tiled, batch)
    found, gradient = hidden_and_gradient(native, batch_native)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    theirs = of_tiles["vision"]["position_embedding"]
    ours = gradient["vision"]["position_embedding"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert np.abs(theirs[1:]).min() > 0


def test_architecture_says_so_only_where_it_is_on():
    tiled = preset("tiny_mono")
    native = tiled.replace(vision=dataclasses.replace(tiled.vision, native=True))
    assert "native" not in tiled.to_dict()["vision"] and Architecture.from_dict(native.to_dict()) == native
    assert not tiled.geometry.native and native.geometry.native and tiled.geometry != native.geometry
    for changes in ({"kind": "intern_vit"}, {"ps_version": "v1"}):
        with pytest.raises(ConfigError, match=r"vision\.native goes with"):
            dataclasses.replace(tiled.vision, native=True, **changes)
