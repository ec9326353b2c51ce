"""Pictures depend only on the generator that they are painted with."""

from __future__ import annotations

import numpy as np

from data_pipelines.recipes.demo.painter import Painter


def test_equal_generators_paint_equal_pictures() -> None:
    painter = Painter(32, heldout=False)
    one, two, other = (painter.any(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.image.size == (32, 32)
    assert one.image.tobytes() == two.image.tobytes() != other.image.tobytes()
