"""Native resolution: how many tokens an image has, and which pixels and places they hold."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import NativeGeometry, native_cells, of_native_cells
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_tokens
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.inspection.page import _pictures
from tests.data_pipelines.encoding.test_patches import encoded

LIMITS = ImageLimits(min_side=1, max_aspect=1e4)
TILING = Tiling(NativeGeometry(56, 14), max_tiles=3)  # at most 48 tokens of 14 pixels


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((84, 42), (6, 3)),  # as it is
        ((90, 36), (6, 3)),  # to whole tokens
        ((3, 5), (1, 1)),
        ((1400, 700), (9, 4)),  # made smaller: 9.8 x 4.9 would be 48
        ((97, 97), (6, 6)),  # 6.93 x 6.93 would round to 49
        ((14_000, 14), (48, 1)),
    ],
)
def test_an_image_keeps_its_shape_within_the_budget(size: tuple[int, int], grid: tuple[int, int]):
    assert tuple(TILING.choose(np.array([size]))[0]) == grid
    assert TILING.tokens(np.array([size]))[0] == grid[0] * grid[1]


def test_budgets_hold_for_any_size_and_no_side_is_longer_than_a_cell_can_say():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, 9, (5000, 2))).astype(int) + 1
    for most in (1, 3, 12, 5000):
        tiling = Tiling(NativeGeometry(56, 14), max_tiles=most)
        grids = tiling.choose(sizes)
        assert (grids >= 1).all() and (grids <= 256).all() and (grids.prod(axis=1) <= 16 * most).all()
        small = (grids > 2).all(axis=1)  # where rounding is not all
        aspect = (grids[:, 0] / grids[:, 1]) / (sizes[:, 0] / sizes[:, 1])
        assert ((aspect[small] > 0.66) & (aspect[small] < 1.5)).all()
        np.testing.assert_array_equal(tiling.tokens(sizes), grids.prod(axis=1))


@pytest.mark.parametrize("path", ["exact", "fast"])
def test_tokens_are_the_resized_image_row_by_row(path: str):
    if path == "fast":
        pytest.importorskip("cykooz_resizer")
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (45, 80, 3), np.uint8))
    patches, cells = image_tokens(encoded(image), TILING, LIMITS, path)
    np.testing.assert_array_equal(cells, native_cells(6, 3))
    if path == "exact":
        expected = np.asarray(image.resize((84, 42), Image.Resampling.BICUBIC))
        for token, row, column in zip(patches, *of_native_cells(cells)[:2]):
            part = expected[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            np.testing.assert_array_equal(token, part)
        [shown] = _pictures(patches, cells, TILING.geometry)
        np.testing.assert_array_equal(shown, expected)
    augmented, same = (image_tokens(encoded(image), TILING, LIMITS, path, np.random.default_rng(2))[0] for _ in "ab")
    np.testing.assert_array_equal(augmented, same)
    assert (augmented != patches).any()
