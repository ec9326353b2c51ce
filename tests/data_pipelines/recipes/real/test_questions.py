"""Questions about collages and of easy-vqa: the answers are right and need the image."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.recipes.easy_vqa import kind_of
from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.real.catalogue import Options
from data_pipelines.recipes.real.detection import Collage, CollageComposer, Placed
from data_pipelines.recipes.real.questions import LESSONS, RECIPES, collage_turns
from data_pipelines.recipes.real.readers.pictures import Pair

NAMES = ["apple", "pear", "plum", "fig", "lemon", "melon", "grape", "peach", "kiwi", "lime", "date", "mango"]


def test_questions_about_a_collage_have_the_right_answer() -> None:
    stamps = [Pair(Image.new("RGBA", (40, 40), (9 * i, 0, 0, 255)), f"A {name}.") for i, name in enumerate(NAMES)]
    composer = CollageComposer(stamps, [])
    kinds = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        collage = composer.collage(rng)
        labels = [p.label for p in collage.placed]
        for question, answer in collage_turns(collage, NAMES, rng):
            kinds.add(question.split()[0])
            if question.startswith("What"):
                assert answer == ", ".join(dict.fromkeys(labels)) + "."
            elif question.startswith("How"):
                assert answer == ["", "One.", "Two.", "Three.", "Four.", "Five."][len(labels)]
            elif question.startswith("Is"):
                assert answer == ("Yes." if question.split(": ")[1].rstrip("?") in labels else "No.")
            elif question.startswith("Where"):
                (placed,) = (p for p in collage.placed if f"<ref>{p.label}</ref>" in question)
                assert answer == f"<ref>{placed.label}</ref><box>[{list(placed.box)}]</box>"
            else:
                a, b = _two(collage, question)
                assert answer == f"The {min((a, b), key=lambda p: p.box[0] + p.box[2]).label}."
    assert kinds == {"What", "How", "Is", "Where", "Which"}


def _two(collage: Collage, question: str) -> list[Placed]:
    match = re.fullmatch(r"Which is further to the left, the (\w+) or the (\w+)\?", question)
    assert match is not None
    return [next(p for p in collage.placed if p.label == name) for name in match.groups()]


def test_easy_vqa_is_asked_question_by_question(tmp_path: Path) -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    counts = RECIPES["easy_vqa"](Options(limit=120), tmp_path, [Path(easy_vqa.__file__).parents[1]])
    for split, name in (("train", "conversations"), ("heldout", "held out")):
        records = list(read_jsonl(tmp_path / f"{split}.jsonl"))
        assert len(records) == counts[name] > 100
        answers: dict[str, Counter[str]] = {}
        for record in records:
            assert (tmp_path / "images" / record["image"]).is_file()
            [asked, answered] = [turn["value"] for turn in record["conversations"]]
            assert asked.startswith("<image>\n") and (answered in ("yes", "no")) == ("_" in record["kind"])
            answers.setdefault(asked, Counter())[answered] += 1
        if split == "heldout":
            assert len({record["image"] for record in records}) == len(records)
        else:
            assert all(found["yes"] == found["no"] for asked, found in answers.items() if "what" not in asked)


def test_lessons_of_easy_vqa_come_one_by_one(tmp_path: Path) -> None:
    """First without questions that deny. In some conversations a first answer names what the second question is
    about."""
    easy_vqa = pytest.importorskip("easy_vqa")
    counts = RECIPES["easy_vqa"](Options(limit=400), tmp_path, [Path(easy_vqa.__file__).parents[1]])
    lengths = {}
    for lesson, may_deny in LESSONS.items():
        kinds: Counter[str] = Counter()
        for record in read_jsonl(tmp_path / f"{lesson}.jsonl"):
            assert (tmp_path / "images" / record["image"]).is_file()
            values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
            how, _, of = kind_of(values[-2]).partition("_")
            kinds["named" if len(values) == 4 else how if of else "what"] += 1
            if len(values) == 4:
                assert kind_of(values[0]) == of
                there = values[1] in values[2].rstrip("?").split()
                assert values[3] == ("yes" if there == (how == "has") else "no")
        by_yes_or_no = kinds["has"] + kinds["lacks"]
        assert counts[lesson] == kinds.total() and (kinds["lacks"] > 0) == may_deny
        assert kinds["what"] == by_yes_or_no * 2 // 10
        assert by_yes_or_no * 0.2 < kinds["named"] <= by_yes_or_no * 0.3
        lengths[lesson] = by_yes_or_no
    assert lengths["any_wording"] == pytest.approx(2 * lengths["affirmative"], rel=0.2)
