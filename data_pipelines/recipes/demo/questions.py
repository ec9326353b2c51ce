"""Questions about composed scenes, with the answers that follow from the scene."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.recipes.conversations import NUMBERS, Turn
from data_pipelines.recipes.demo.scenes import COLORS, SHAPES, Scene, Shape, article


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene; ``kind`` names the skill tested (a key of ``QUESTION_KINDS``)."""

    kind: str
    text: str
    answer: str


def _unique(scene: Scene, attribute: str) -> list[Shape]:
    """The shapes whose colour or shape (``attribute``) no other shape of the scene has."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [shape for shape, value in zip(scene.shapes, values) if values.count(value) == 1]


def _pick(rng: np.random.Generator, shapes: list[Shape]) -> Shape | None:
    return shapes[int(rng.integers(len(shapes)))] if shapes else None


def _ask_color(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, _unique(scene, "shape"))
    return (f"what color is the {shape.shape}?", shape.color) if shape else None


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, _unique(scene, "color"))
    return (f"what shape is {shape.color}?", shape.shape) if shape else None


def _ask_color_at(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, list(scene.shapes))
    return (f"what color is the shape at the {scene.place(shape)}?", shape.color) if shape else None


def _ask_shape_at(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, list(scene.shapes))
    return (f"what shape is at the {scene.place(shape)}?", shape.shape) if shape else None


def _ask_place(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, list(scene.shapes))
    return (f"where is the {shape.label}?", scene.place(shape)) if shape else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> Turn | None:
    return "how many shapes are there?", NUMBERS[len(scene.shapes)]


def _ask_exists(scene: Scene, rng: np.random.Generator) -> Turn | None:
    shape = _pick(rng, list(scene.shapes))
    if shape is None:
        return None
    if rng.integers(2):
        return f"is there {article(shape.label)}?", "yes"
    present = {other.label for other in scene.shapes}
    while True:  # a near miss: the colour or the shape occurs, but not both together
        if rng.integers(2):
            label = f"{rng.choice(list(COLORS))} {shape.shape}"
        else:
            label = f"{shape.color} {rng.choice(SHAPES)}"
        if label not in present:
            return f"is there {article(label)}?", "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Turn | None:
    pairs = [
        (a, b, axis) for a in scene.shapes for b in scene.shapes for axis in (0, 1) if a.cell[axis] != b.cell[axis]
    ]
    if not pairs:
        return None
    a, b, axis = pairs[int(rng.integers(len(pairs)))]
    relation = ("above", "left of")[axis]
    return f"is the {a.label} {relation} the {b.label}?", "yes" if a.cell[axis] < b.cell[axis] else "no"


QUESTION_KINDS: dict[str, Callable[[Scene, np.random.Generator], Turn | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "color_at": _ask_color_at,
    "shape_at": _ask_shape_at,
    "place": _ask_place,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


def sample_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to ``count`` different questions about the scene, of different kinds as far as possible."""
    kinds = [str(kind) for kind in rng.permutation(list(QUESTION_KINDS))]
    found: dict[str, Question] = {}
    for kind in kinds * 3:
        turn = QUESTION_KINDS[kind](scene, rng)
        if turn is not None and turn[0] not in found and len(found) < count:
            found[turn[0]] = Question(kind, *turn)
    return list(found.values())
