"""Reads the package easy-vqa (MIT): 5,000 pictures of one shape, with questions and one-word answers."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipelines.recipes.conversations import Turn


def read_easy_vqa(root: Path, split: str) -> list[tuple[Path, list[Turn]]]:
    """(image, turns) of every image of the "train" or "test" split; ``root`` is the folder that holds the package."""
    folder = root / "easy_vqa/data" / split
    turns: dict[int, list[Turn]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        turns.setdefault(image, []).append((question, answer))
    return [(folder / f"images/{image}.png", turns[image]) for image in sorted(turns)]
