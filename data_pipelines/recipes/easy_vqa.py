"""Reads the package easy-vqa (MIT): 5,000 pictures of one shape, with questions and one-word answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.recipes.conversations import Turn

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
_OPPOSITE = {"yes": "no", "no": "yes"}
_ABSENT = {"has": "no", "lacks": "yes"}  # what is answered if it is not there


def read_easy_vqa(root: Path, split: str) -> list[tuple[Path, list[Turn]]]:
    """(image, turns) of every image of the "train" or "test" split; ``root`` is the folder that holds the package."""
    folder = root / "easy_vqa/data" / split
    turns: dict[int, list[Turn]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        turns.setdefault(image, []).append((question, answer))
    return [(folder / f"images/{image}.png", turns[image]) for image in sorted(turns)]


def balanced(images: Sequence[tuple[Path, list[Turn]]], rng: np.random.Generator) -> list[tuple[Path, list[Turn]]]:
    """``images`` with as many "yes" as "no" for each wording of a question; the surplus, chosen at random, is left out.

    As published, 8 of 9 images answer "is there a red shape?" with "no": whoever knows the wording need not look.
    """
    answered: dict[Turn, list[tuple[int, int]]] = {}
    for image, (_, turns) in enumerate(images):
        for place, turn in enumerate(turns):
            answered.setdefault(turn, []).append((image, place))
    surplus: set[tuple[int, int]] = set()
    for question, answer in answered:
        if answer in _OPPOSITE:
            places = answered[question, answer]
            wanted = min(len(places), len(answered.get((question, _OPPOSITE[answer]), ())))
            surplus.update(places[index] for index in rng.permutation(len(places))[wanted:])
    kept = [
        (path, [turn for place, turn in enumerate(turns) if (image, place) not in surplus])
        for image, (path, turns) in enumerate(images)
    ]
    return [(path, turns) for path, turns in kept if turns]


def kind_of(question: str) -> str:
    """What is asked: "color" or "shape", or, to be answered by yes or no, "has_color", "has_shape", or if it is what is
    missing ("is there not a circle?"), "lacks_color", "lacks_shape".
    """
    words = set(question.rstrip("?").split())
    if "what" in words:
        return "color" if "color" in words else "shape"
    return f"{'lacks' if words & {'no', 'not'} else 'has'}_{'color' if words & COLORS else 'shape'}"


def named_first(turns: Sequence[Turn], rng: np.random.Generator) -> list[Turn] | None:
    """A question by yes or no among the ``turns`` about an image, after one whose answer names what it asks about.

    None if there are no two such questions.
    """
    for index in rng.permutation(len(turns)):
        of = kind_of(turns[index][0]).partition("_")[2]
        if whats := [turn for turn in turns if kind_of(turn[0]) == of]:
            return [whats[int(rng.integers(len(whats)))], turns[index]]
    return None


def caption(turns: Iterable[Turn]) -> str | None:
    """What the turns about an image say of it: "a red circle", "a circle", "a red shape", or None if nothing.

    A "what" question and its answer are about what is there, and so is a "yes", or a "no" to a question that denies.
    """
    present: set[str] = set()
    for question, answer in turns:
        if answer != _ABSENT.get(kind_of(question).partition("_")[0]):
            present |= {*question.rstrip("?").split(), answer}
    color, shape = present & COLORS, present & SHAPES
    return " ".join(["a", *color, *(shape or ["shape"])]) if color or shape else None
