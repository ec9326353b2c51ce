"""Collages: boxes are exact."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.recipes.real.detection import CollageComposer
from data_pipelines.recipes.real.readers.pictures import Pair


def test_boxes_are_where_the_stamps_are() -> None:
    stamp = Image.new("RGBA", (90, 90), (0, 0, 0, 0))
    ImageDraw.Draw(stamp).rectangle((20, 10, 69, 89), fill=(255, 0, 0, 255))
    composer = CollageComposer([Pair(stamp, "A red block.")], [])
    for seed in range(10):
        collage = composer.collage(np.random.default_rng(seed))
        pixels = np.asarray(collage.image).astype(int)
        red = (pixels[..., 0] > 180) & (pixels[..., 1] < 100) & (pixels[..., 2] < 100)
        inside = np.zeros_like(red)
        for placed in collage.placed:
            assert placed.label == "red block"
            x1, y1, x2, y2 = np.array(placed.box) * np.tile(collage.image.size, 2) / 1000
            inside[int(y1 + 0.5) : int(y2 + 0.5), int(x1 + 0.5) : int(x2 + 0.5)] = True
        assert np.mean(red != inside) < 0.004
