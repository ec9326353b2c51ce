"""Tasks for lm-evaluation-harness: each question has one right answer, and nothing gives it away."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.real.catalogue import TASKS, Options
from data_pipelines.recipes.real.language_tasks import RECIPES, word_questions
from tests.data_pipelines.recipes.real.wordnet import write_wordnet


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


def test_words_are_asked_once_among_meanings_of_other_words(root: Path) -> None:
    questions = word_questions(root, 24, seed=0)
    assert len(questions) == len({(q["part"], q["word"]) for q in questions}) == 24
    assert Counter(q["answer"] for q in questions) == dict.fromkeys(range(4), 6)
    for question in questions:
        right = question["choices"][question["answer"]]
        assert right == f"the meaning of number {question['word'][4:]} among {question['part']}s"
        assert len(set(question["choices"])) == 4 and all(question["part"] in choice for choice in question["choices"])
        assert question["word"] not in right
    assert questions == word_questions(root, 24, seed=0) != word_questions(root, 24, seed=1)


def test_what_gives_the_answer_away_is_not_asked(root: Path) -> None:
    """Names, short definitions, ones that hold their word, a second sense, and parts with too few words."""
    asked = {question["word"] for question in word_questions(root, 1000, seed=0)}
    assert asked == {part + letter for part in ("noun", "verb") for letter in "abcdefghijklmnop"}


def test_the_set_is_a_task_of_the_harness(root: Path, tmp_path: Path) -> None:
    assert RECIPES["word_meaning"](Options(limit=8), tmp_path, [root]) == {"questions": 8}
    assert len(list(read_jsonl(tmp_path / "word_meaning.jsonl"))) == 8
    assert "test_split: test" in (tmp_path / "word_meaning.yaml").read_text() and TASKS == "lm_eval"
