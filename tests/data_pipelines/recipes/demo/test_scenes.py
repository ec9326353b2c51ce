"""Composed scenes: the picture shows what captions and boxes say."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.recipes.conversations import boxes_text
from data_pipelines.recipes.demo import scenes


def _scenes(count: int = 200, **options: object) -> list[scenes.Scene]:
    return [scenes.sample_scene(np.random.default_rng(i), **options) for i in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [2, 3])
def test_shapes_stay_in_their_cells_and_differ(grid: int) -> None:
    for scene in _scenes(grid=grid):
        assert 1 <= len(scene.shapes) <= 3
        assert len({s.label for s in scene.shapes}) == len({s.cell for s in scene.shapes}) == len(scene.shapes)
        assert [s.cell for s in scene.shapes] == sorted(s.cell for s in scene.shapes)
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box()
            row, column = shape.cell
            assert 1000 * column / grid - 1 <= x1 < x2 <= 1000 * (column + 1) / grid + 1
            assert 1000 * row / grid - 1 <= y1 < y2 <= 1000 * (row + 1) / grid + 1


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_box_is_where_the_pixels_are(shape: str) -> None:
    found = [s for s in _scenes(400, shapes=1) if s.shapes[0].shape == shape][:5]
    assert found
    for scene in found:
        edge = 100
        pixels = np.asarray(scenes.render(scene, edge, np.random.default_rng(0)), np.float32)
        assert pixels.shape == (edge, edge, 3)
        ink = np.abs(pixels - np.asarray(scene.background)).max(-1) > 40
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * 10
        np.testing.assert_allclose(drawn, scene.shapes[0].box(), atol=25)


def test_colors_differ_in_their_pixels() -> None:
    """The middle of a square is nearest to the colour that it is named after."""
    for scene in (s for s in _scenes(300, shapes=1) if s.shapes[0].shape == "square"):
        shape = scene.shapes[0]
        pixels = np.asarray(scenes.render(scene, 64, np.random.default_rng(1)), np.float32)
        middle = pixels[int(shape.center[1] * 64), int(shape.center[0] * 64)]
        nearest = min(scenes.COLORS, key=lambda c: np.linalg.norm(middle - np.asarray(scenes.COLORS[c])))
        assert nearest == shape.color


def test_the_split_depends_only_on_content_and_is_a_tenth() -> None:
    sampled = _scenes(2000)
    assert 0.07 < np.mean([s.is_heldout() for s in sampled]) < 0.13
    assert not any(s.is_heldout() for s in _scenes(50, heldout=False))
    assert all(s.is_heldout() for s in _scenes(50, heldout=True))


def _fixed() -> scenes.Scene:
    place = {(0, 0): (0.25, 0.25), (0, 1): (0.75, 0.25)}
    kinds = {(0, 0): ("red", "circle"), (0, 1): ("orange", "square")}
    return scenes.Scene(2, tuple(scenes.Shape(*kinds[c], c, place[c], 0.2) for c in place), (255, 255, 255))


def test_caption_and_boxes_of_a_known_scene() -> None:
    scene = _fixed()
    assert scenes.caption(scene) == "a red circle left of an orange square"
    text = boxes_text([(s.label, s.box()) for s in scene.shapes])
    assert text == (
        "<ref>red circle</ref><box>[[50, 50, 450, 450]]</box><ref>orange square</ref><box>[[550, 50, 950, 450]]</box>"
    )
