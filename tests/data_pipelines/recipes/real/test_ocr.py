"""Rendered text."""

from __future__ import annotations

import numpy as np

from data_pipelines.recipes.real.ocr import draw_page


def test_pages_hold_their_text() -> None:
    """More words give more ink, and every line fits."""
    drawn: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(12):
        image, text = draw_page(["one", "one " * 40], np.random.default_rng(seed))
        pixels = np.asarray(image.convert("L")).astype(int)
        ink = np.abs(pixels - pixels[0, 0]) > 60
        assert ink.any() and not ink[:, -10:].any() and not ink[-2:].any()
        assert set(text.split()) == {"one"}
        drawn["\n" in text].append(ink.sum())
    assert min(drawn[True]) > max(drawn[False])
