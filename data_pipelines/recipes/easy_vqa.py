"""Reads the package easy-vqa (MIT): 5,000 pictures of one shape, with questions and one-word answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.recipes.conversations import Turn

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})


def read_easy_vqa(root: Path, split: str) -> list[tuple[Path, list[Turn]]]:
    """(image, turns) of every image of the "train" or "test" split; ``root`` is the folder that holds the package."""
    folder = root / "easy_vqa/data" / split
    turns: dict[int, list[Turn]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        turns.setdefault(image, []).append((question, answer))
    return [(folder / f"images/{image}.png", turns[image]) for image in sorted(turns)]


def caption(turns: Iterable[Turn]) -> str | None:
    """What the turns about an image say of it: "a red circle", "a circle", "a red shape", or None if nothing.

    A "what" question and its answer are about what is there, and so is a "yes", or a "no" to a question that denies.
    """
    present: set[str] = set()
    for question, answer in turns:
        words = set(question.rstrip("?").split())
        denies = bool(words & {"no", "not"})
        if "what" in words or answer == ("no" if denies else "yes"):
            present |= words | {answer}
    color, shape = present & COLORS, present & SHAPES
    return " ".join(["a", *color, *(shape or ["shape"])]) if color or shape else None
