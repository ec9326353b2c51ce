"""Questions about composed scenes: the answers are right."""

from __future__ import annotations

import re

import numpy as np

from data_pipelines.recipes.demo import questions
from data_pipelines.recipes.demo.scenes import Scene, sample_scene


def test_every_kind_of_question_has_the_right_answer() -> None:
    """Answers are worked out again from the list of shapes by parsing the question."""
    kinds = set()
    for number, scene in enumerate(sample_scene(np.random.default_rng(i)) for i in range(300)):
        for question in questions.sample_questions(scene, np.random.default_rng(number), 8):
            kinds.add(question.kind)
            assert question.answer == _answer(scene, question.text), question
    assert kinds == set(questions.QUESTION_KINDS)


def _answer(scene: Scene, text: str) -> str:
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
