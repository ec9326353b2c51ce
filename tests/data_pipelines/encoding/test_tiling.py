import json

import numpy as np
import pytest

from data_pipelines.batch import TileGeometry
from data_pipelines.encoding.tiling import Tiling, cut_tiles, patch_cells

RNG = np.random.default_rng(0)


def test_grid_equals_reference_for_all_sizes(golden_dir):
    for case in json.loads((golden_dir / "tiling.json").read_text()):
        grid = Tiling(max_tiles=case["max_tiles"]).choose(np.array([[case["width"], case["height"]]]))
        assert grid.tolist() == [[case["columns"], case["rows"]]], case


def test_grids_of_many_images_equal_those_of_each():
    tiling, sizes = Tiling(min_tiles=2, max_tiles=24), RNG.integers(1, 4000, (300, 2))
    one_by_one = np.concatenate([tiling.choose(size[None]) for size in sizes])
    np.testing.assert_array_equal(tiling.choose(sizes), one_by_one)
    tiles = one_by_one.prod(axis=1)
    assert tiles.min() >= 2 and tiles.max() <= 24
    np.testing.assert_array_equal(tiling.tokens(sizes), (tiles + 1) * 256)


def test_patches_follow_tiles_then_tokens():
    geometry = TileGeometry(tile_size=8, token_pixels=4)
    image = np.zeros((8, 16, 3), np.uint8)
    for y in range(2):
        for x in range(4):
            image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 10 * y + x
    out = np.zeros((8, 4, 4, 3), np.uint8)
    cut_tiles(image, geometry, out)
    assert out[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert patch_cells(geometry, 8).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    columnwise = TileGeometry(tile_size=8, token_pixels=4, ps_version="v1")
    cut_tiles(image, columnwise, out)
    assert out[:, 0, 0, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    assert patch_cells(columnwise, 8).tolist() == [0, 2, 1, 3, 0, 2, 1, 3]


def test_images_of_a_sample_share_the_tiles():
    assert Tiling(max_tiles=12).shared(5).max_tiles == 2
    assert Tiling(max_tiles=4, min_tiles=3).shared(9) == Tiling(max_tiles=1, min_tiles=1)


SIXTY = TileGeometry(tile_size=60, token_pixels=30)


@pytest.mark.parametrize(
    ("size", "tiling", "grid"),
    [
        # Nearest are 1x1 and 2x2; half of the pixels of 2x2 tiles are 7200.
        ((80, 90), Tiling(SIXTY, max_tiles=4), [1, 1]),
        ((80, 91), Tiling(SIXTY, max_tiles=4), [2, 2]),
        ((80, 91), Tiling(SIXTY, max_tiles=3), [1, 1]),
        # None of the nearest is small enough: the smallest.
        ((9, 9), Tiling(SIXTY, min_tiles=4, max_tiles=9), [2, 2]),
        ((9, 9), Tiling(SIXTY, min_tiles=5, max_tiles=9), [3, 3]),
        ((900, 900), Tiling(SIXTY, min_tiles=4, max_tiles=9), [3, 3]),
        ((900, 900), Tiling(SIXTY, min_tiles=4, max_tiles=8), [2, 2]),
        # Exactly so many tiles.
        ((900, 300), Tiling(SIXTY, min_tiles=3, max_tiles=3), [3, 1]),
        ((300, 900), Tiling(SIXTY, min_tiles=3, max_tiles=3), [1, 3]),
    ],
    ids=str,
)
def test_grids_at_their_limits(size, tiling, grid):
    assert tiling.choose(np.array([size])).tolist() == [grid]


@pytest.mark.parametrize(("thumbnail", "tokens"), [(True, [4, 12]), (False, [4, 8])])
def test_a_thumbnail_goes_with_several_tiles(thumbnail, tokens):
    tiling = Tiling(SIXTY, max_tiles=2, thumbnail=thumbnail)
    assert tiling.tokens(np.array([[60, 60], [120, 60]])).tolist() == tokens
