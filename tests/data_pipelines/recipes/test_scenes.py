"""Composed scenes: the picture shows what captions, boxes and answers say."""

from __future__ import annotations

import re

import numpy as np
import pytest

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


def test_colors_are_told_apart_by_their_pixels() -> None:
    """The middle of a square is nearest to the colour that it is named after."""
    for scene in (s for s in _scenes(300, shapes=1) if s.shapes[0].shape == "square"):
        shape = scene.shapes[0]
        pixels = np.asarray(scenes.render(scene, 64, np.random.default_rng(1)), np.float32)
        middle = pixels[int(shape.center[1] * 64), int(shape.center[0] * 64)]
        nearest = min(scenes.COLORS, key=lambda c: np.linalg.norm(middle - np.asarray(scenes.COLORS[c])))
        assert nearest == shape.color


def test_split_depends_on_content_alone_and_is_a_tenth() -> None:
    sampled = _scenes(2000)
    assert 0.07 < np.mean([s.heldout() for s in sampled]) < 0.13
    assert not any(s.heldout() for s in _scenes(50, heldout=False))
    assert all(s.heldout() for s in _scenes(50, heldout=True))


def _fixed() -> scenes.Scene:
    place = {(0, 0): (0.25, 0.25), (0, 1): (0.75, 0.25)}
    kinds = {(0, 0): ("red", "circle"), (0, 1): ("orange", "square")}
    return scenes.Scene(2, tuple(scenes.Shape(*kinds[c], c, place[c], 0.2) for c in place), (255, 255, 255))


def test_caption_and_boxes_of_a_known_scene() -> None:
    scene = _fixed()
    assert scenes.caption(scene) == "a red circle left of an orange square"
    text = scenes.boxes_text([(s.label, s.box()) for s in scene.shapes])
    assert text == (
        "<ref>red circle</ref><box>[[50, 50, 450, 450]]</box><ref>orange square</ref><box>[[550, 50, 950, 450]]</box>"
    )


def test_every_kind_of_question_is_answered_rightly() -> None:
    """Answers are worked out again from the list of shapes by parsing the question."""
    kinds = set()
    for number, scene in enumerate(_scenes(300)):
        for question in scenes.questions(scene, np.random.default_rng(number), 8):
            kinds.add(question.kind)
            assert question.answer == _answer(scene, question.text), question
    assert kinds == set(scenes.QUESTION_KINDS)


def _answer(scene: scenes.Scene, text: str) -> str:
    by_label = {s.label: s for s in scene.shapes}
    if match := re.fullmatch(r"what color is the shape at the (.+)\?", text):
        return next(s.color for s in scene.shapes if scene.place(s) == match[1])
    if match := re.fullmatch(r"what shape is at the (.+)\?", text):
        return next(s.shape for s in scene.shapes if scene.place(s) == match[1])
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        (shape,) = (s for s in scene.shapes if s.shape == match[1])
        return shape.color
    if match := re.fullmatch(r"what shape is (\w+)\?", text):
        (shape,) = (s for s in scene.shapes if s.color == match[1])
        return shape.shape
    if match := re.fullmatch(r"where is the (.+)\?", text):
        return scene.place(by_label[match[1]])
    if match := re.fullmatch(r"is there an? (.+)\?", text):
        return "yes" if match[1] in by_label else "no"
    if match := re.fullmatch(r"is the (\w+ \w+) (above|left of) the (\w+ \w+)\?", text):
        axis = 0 if match[2] == "above" else 1
        return "yes" if by_label[match[1]].cell[axis] < by_label[match[3]].cell[axis] else "no"
    assert text == "how many shapes are there?"
    return ("", "one", "two", "three")[len(scene.shapes)]
