"""The package easy-vqa, as it is installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from data_pipelines.recipes.easy_vqa import COLORS, SHAPES, balanced, caption, kind_of, read_easy_vqa

easy_vqa = pytest.importorskip("easy_vqa")


def test_questions_are_joined_with_their_images() -> None:
    for split in ("train", "test"):
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        triples = list(zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True))
        images = read_easy_vqa(Path(easy_vqa.__file__).parents[1], split)
        assert sum(len(turns) for _, turns in images) == len(triples) > 0
        number, (path, turns) = next((int(path.stem), (path, turns)) for path, turns in images if len(turns) > 1)
        assert turns == [(question, answer) for question, answer, image in triples if image == number]
        assert path.is_file() and path.samefile(paths[number])


def test_no_answer_by_yes_or_no_follows_from_the_wording() -> None:
    for split in ("train", "test"):
        images = read_easy_vqa(Path(easy_vqa.__file__).parents[1], split)
        kept = balanced(images, np.random.default_rng(0))
        before, after = (Counter(turn for _, turns in those for turn in turns) for those in (images, kept))
        for question, answer in before:
            if "what" in question:
                assert after[question, answer] == before[question, answer]
            else:
                assert after[question, "yes"] == after[question, "no"] > 0
                assert after[question, answer] == min(before[question, "yes"], before[question, "no"])
        published = {path: iter(turns) for path, turns in images}
        assert all(turn in published[path] for path, turns in kept for turn in turns)  # of the same image, in order
        assert len(kept) >= 0.95 * len(images)
    again, other = (balanced(images, np.random.default_rng(seed)) for seed in (0, 1))
    assert kept == again != other


def test_a_question_by_yes_or_no_that_has_one_answer_only_is_left_out() -> None:
    turns = [("is there a circle?", "yes"), ("what color is the circle?", "red")]
    assert balanced([(Path("a"), turns), (Path("b"), turns[:1])], np.random.default_rng(0)) == [(Path("a"), turns[1:])]


@pytest.mark.parametrize(
    ("kind", "questions"),
    {
        "color": ("what color is the circle?", "what is the color of the shape?"),
        "shape": ("what is the black shape?", "what shape does the image contain?"),
        "has_color": ("is a teal shape present?", "does the image contain a red shape?"),
        "has_shape": ("is there a circle in the image?",),
        "lacks_color": ("is no teal shape present?", "does the image not contain a red shape?"),
        "lacks_shape": ("is there not a circle in the image?", "is no triangle present?"),
    }.items(),
)
def test_the_kind_of_a_question(kind: str, questions: tuple[str, ...]) -> None:
    assert {kind_of(question) for question in questions} == {kind}


def test_captions_name_what_the_pixels_show() -> None:
    # Area over the root of the determinant of the coordinates' covariance: the same wherever and however it is drawn.
    ratios = {"triangle": 108**0.5, "rectangle": 12.0, "circle": 4 * np.pi}
    values = {color: np.array(ImageColor.getrgb(color)) for color in COLORS}
    compared = set()
    for path, turns in read_easy_vqa(Path(easy_vqa.__file__).parents[1], "train")[:400]:
        words = set((caption(turns) or "").split())
        pixels = np.asarray(Image.open(path).convert("RGB"))
        found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        drawn = min(found[np.argsort(-counts)[:2]], key=np.sum)  # the background is the lighter one of the two
        if words & COLORS:
            assert words & COLORS == {min(COLORS, key=lambda color: np.abs(values[color] - drawn).sum())}, path
        mask = (pixels == drawn).all(axis=-1)
        if words & SHAPES and mask.sum() > 300:
            ratio = mask.sum() / np.linalg.det(np.cov(np.nonzero(mask))) ** 0.5
            assert words & SHAPES == {min(SHAPES, key=lambda shape: abs(ratios[shape] - ratio))}, path
            compared.add(frozenset(words))
    assert len(compared) >= 24  # eight colors of three shapes


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("what color is the shape?", "red"), ("what is the shape?", "circle")], "a red circle"),
        ([("is there a teal shape?", "yes"), ("is there no circle?", "no")], "a teal circle"),
        ([("is there not a blue shape in the image?", "yes"), ("is there a circle?", "no")], None),
        ([("what is the green shape?", "triangle")], "a green triangle"),
        ([("does the image contain a rectangle?", "yes")], "a rectangle"),
        ([("is a gray shape present?", "yes")], "a gray shape"),
        ([], None),
    ],
)
def test_captions_say_what_the_answers_say(turns: list[tuple[str, str]], expected: str | None) -> None:
    assert caption(turns) == expected
