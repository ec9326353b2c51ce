"""Tiles made on the device against Pillow's, and batches against those of the exact path."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import TileGeometry
from data_pipelines.encoding.crops import Crops, bicubic
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling, patch_cells
from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError
from mono_jax.parallel.crops import patches_of
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.rows import LocalRows
from tests.made_sets import config, packed, tars, write_pairs

RNG = np.random.default_rng(0)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# Enlarged, shrunk, both, unchanged; tall ones that shrink (where Pillow may start with the height), too large ones.
SIZES = [(40, 30), (100, 95), (56, 56), (112, 56), (200, 60), (60, 200), (70, 90), (150, 149), (57, 300), (320, 300)]
made = jax.jit(patches_of)


@pytest.mark.parametrize("room", [56, 160])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_byte_is_that_of_the_exact_path(version: str, room: int) -> None:
    geometry = TileGeometry(56, 14, version)
    tiling, tokens = Tiling(geometry, max_tiles=4), 5 * geometry.tokens_per_tile
    on_device = 0
    for size in SIZES:
        image = png(*size)
        exact = image_patches(image, tiling, ImageLimits())
        batch = Crops.fields(1, tokens + 3, room, geometry)  # as many slots as do not make whole tiles
        batch["crop_pixels"][:] = 255
        crops = Crops.of(batch, 0)
        found = image_patches(image, tiling, ImageLimits(), "device", out=crops)
        assert isinstance(found, Crops) and len(found) == len(exact)
        cells = np.zeros((1, tokens + 3), np.int32)
        cells[0, : len(exact)] = patch_cells(geometry, len(exact))
        patches = np.asarray(made(*(batch[f"crop_{name}"] for name in ("pixels", "starts", "weights")), cells))[0]
        np.testing.assert_array_equal(patches[: len(exact)], exact)
        assert not patches[len(exact) :].any()
        on_device += int((batch["crop_weights"][0] != 0).sum(axis=-1).max() > 1)
    assert on_device == (6 if room > 56 else 3)  # the rest (unchanged, too large, tall and shrunk): on the host


@pytest.mark.parametrize(("size", "out"), [(40, 56), (90, 56), (300, 168), (56, 56), (7, 448), (3000, 448)])
def test_weights_are_pillows(size: int, out: int) -> None:
    """With one bright line at a time in the image, the resized image shows the weight of that line."""
    starts, weights = bicubic(size, out)
    for line in RNG.integers(0, size, 6).tolist():
        pixels = np.full((size, 1), 100, np.uint8)
        pixels[line] = 200
        resized = np.asarray(Image.fromarray(pixels).resize((1, out), Image.Resampling.BICUBIC))[:, 0]
        at = line - starts
        weight = np.where(
            (at >= 0) & (at < weights.shape[1]), weights[np.arange(out), np.clip(at, 0, weights.shape[1] - 1)], 0
        )
        total = 100 * weights.sum(axis=1, dtype=np.int64) + 100 * weight.astype(np.int64)
        np.testing.assert_array_equal(np.clip((total + (1 << 21)) >> 22, 0, 255), resized)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 40, broken=(3, 11))
    return tars(folder)


@pytest.mark.parametrize("boundary_block", [0, 4])
def test_batches_are_those_of_the_exact_path(sets: dict, golden_dir, tmp_path, boundary_block: int) -> None:
    changes = {"batch_size": 4, "crop_size": 100, "boundary_block": boundary_block}
    changes |= {"visual_tokens": 320, "text_tokens": 256} if boundary_block else {}
    exact, device = (
        packed(config(golden_dir, sets, pixel_path=path, **changes), tmp_path / path) for path in ("exact", "device")
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    for step in range(2):
        first, second = exact.batch(step), device.batch(step)
        assert "patches" not in second and "crop_pixels" not in first
        placed = LocalRows(mesh, 4).put(second)
        assert set(placed) == set(first)
        for name, array in first.items():
            np.testing.assert_array_equal(np.asarray(placed[name]), array, name)
        assert placed["patches"].sharding.is_equivalent_to(LocalRows(mesh, 4).put(first)["patches"].sharding, 5)
    assert exact.report.skipped == device.report.skipped
    assert any((device.batch(step)["crop_weights"] != 0).sum(-1).max() > 1 for step in range(2))


def test_there_is_room_for_a_tile(sets: dict, golden_dir, tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.crop_size is 55: it must be at least 56"):
        packed(config(golden_dir, sets, pixel_path="device", crop_size=55), tmp_path)


def test_devices_that_share_rows_are_refused(sets: dict, golden_dir, tmp_path) -> None:
    data = packed(config(golden_dir, sets, pixel_path="device", batch_size=2), tmp_path)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=2), jax.devices()[:2])
    with pytest.raises(ConfigError, match="pixel_path='device'"):
        LocalRows(mesh, 2).put(data.batch(0))
