import io
import json

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from safetensors.numpy import load_file

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, TileGeometry
from data_pipelines.encoding import patches
from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.patches import ExactResizer, FastResizer, image_patches
from data_pipelines.encoding.tiling import Tiling

LIMITS = ImageLimits(min_side=1, max_aspect=1e9)
RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 72)))


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("number", range(4))
def test_pixels_equal_reference_bit_for_bit(golden_dir, number):
    case = json.loads((golden_dir / f"images/{number}.json").read_text())
    wanted = load_file(golden_dir / f"images/{number}.safetensors")["pixel_values"]
    tiling = Tiling(TileGeometry(case["tile"], 28), 1, case["max_tiles"], case["thumbnail"])
    found = image_patches((golden_dir / f"images/{number}.png").read_bytes(), tiling, LIMITS)
    edge = case["tile"] // 28
    normalised = (found.astype(np.float32) / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD  # as on the device
    tiles = normalised.reshape(-1, edge, edge, 28, 28, 3).transpose(0, 5, 1, 3, 2, 4)
    np.testing.assert_array_equal(tiles.reshape(wanted.shape), wanted)


def test_fast_path_is_near_the_exact_one():
    pytest.importorskip("cykooz_resizer")
    for width, height in ((134, 101), (40, 30)):
        difference = FastResizer(SMOOTH)(width, height).astype(int) - ExactResizer(SMOOTH)(width, height)
        assert np.abs(difference).max() <= 3
    large = np.asarray(Image.fromarray(SMOOTH).resize((960, 720), Image.Resampling.BICUBIC))
    data = encoded(Image.fromarray(large), "JPEG", quality=95)
    assert decode(data, LIMITS, at_least=(100, 100)).shape[0] < 720
    tiling = Tiling(TileGeometry(tile_size=56), max_tiles=6)
    exact, fast = (image_patches(data, tiling, LIMITS, path).astype(int) for path in ("exact", "fast"))
    assert exact.shape == fast.shape
    assert np.abs(exact - fast).mean() < 1


def test_jpeg_augmentation_follows_its_seed():
    data, tiling = encoded(Image.fromarray(SMOOTH)), Tiling(TileGeometry(tile_size=56), max_tiles=6)
    plain = image_patches(data, tiling, LIMITS)
    one, same, other = (image_patches(data, tiling, LIMITS, augment=np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert 0 < np.abs(one.astype(int) - plain).mean() < 6


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fast_path_of_turned_jpegs_is_near_the_exact_one(orientation, monkeypatch):
    """A tall image that is stored wide is cut into a tall grid, and decoded as large as that needs, not larger."""
    pytest.importorskip("cykooz_resizer")
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray(SMOOTH).resize((1200, 300), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95, exif=exif)
    tiling = Tiling(TileGeometry(tile_size=56), max_tiles=6)
    shapes = []

    def spied(*args):
        image = decode(*args)
        shapes.append(image.shape[:2])
        return image

    monkeypatch.setattr(patches, "decode", spied)
    exact, fast = (image_patches(data, tiling, LIMITS, path).astype(int) for path in ("exact", "fast"))
    assert shapes == ([(1200, 300), (300, 75)] if orientation >= 5 else [(300, 1200), (75, 300)])
    assert exact.shape == fast.shape == (4 * 5, 28, 28, 3)
    assert np.abs(exact - fast).mean() < 1


def test_each_tile_is_recompressed_by_itself_in_reading_order():
    """Three tiles across and two down, no resizing; their qualities are drawn one after another."""
    tile = 56
    image = np.asarray(Image.fromarray(SMOOTH).resize((3 * tile, 2 * tile), Image.Resampling.BICUBIC))
    tiling = Tiling(TileGeometry(tile_size=tile), min_tiles=6, max_tiles=6, thumbnail=False)
    found = image_patches(encoded(Image.fromarray(image)), tiling, LIMITS, augment=np.random.default_rng(4))
    rng, wanted = np.random.default_rng(4), []
    for row in range(2):
        for column in range(3):
            part = image[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            quality = int(rng.integers(75, 101))
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(part), quality=quality, colorsubsampling="420")
            wanted.append(simplejpeg.decode_jpeg(data).reshape(2, 28, 2, 28, 3).swapaxes(1, 2).reshape(4, 28, 28, 3))
    np.testing.assert_array_equal(found, np.concatenate(wanted))
