"""Errors and warnings before a model is loaded: missing files, tasks that cannot be scored, weaker scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from mono_jax.evaluation.benchmarks.catalogue import BENCHMARKS, find_tasks, need_files
from mono_jax.evaluation.benchmarks.preparing import check, prepare
from mono_jax.evaluation.benchmarks.reading.example import Example
from tests.mono_jax.evaluation import small_benchmarks
from tests.mono_jax.evaluation.small_benchmarks import png, table
from tests.mono_jax.evaluation.test_readers import jsonl, picture

YES_NO = [{"question": "q?", "answer": "Yes"}, {"question": "p?", "answer": "No"}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_benchmarks.write(tmp_path)


@pytest.mark.parametrize("name", small_benchmarks.TASKS)
def test_good_files_leave_nothing_to_say(data: Path, name: str):
    [task] = find_tasks(name)
    assert prepare(task, data).notes == []


@pytest.mark.parametrize(
    ("name", "count"),
    [("mme", 2), ("mmbench_dev_en", 2), ("hallusionbench", 4), ("pope", 3), ("textvqa_val", 3)],
)
def test_a_limit_keeps_sets_whole(data: Path, name: str, count: int):
    """Of three: a pair, a question in both orders (which are far apart in the file), a set though it is larger."""
    [task] = find_tasks(name)
    limited, every = prepare(task, data, 3), prepare(task, data)
    assert len(limited.examples) == count and limited.notes == []
    kept = {example.id for example in limited.examples}
    assert [e.id for e in limited.examples] == [e.id for e in every.examples if e.id in kept]


def test_rows_that_repeat_a_picture_are_about_one_picture(tmp_path: Path):
    """By content if it has no name. Two identical images count as two if the benchmark gives them two names."""
    rows = [{**row, "image": png("red"), "category": "color"} for row in YES_NO]
    table(tmp_path / "MME.tsv", [{"index": i, **row} for i, row in enumerate(rows)])
    first, second = BENCHMARKS["mme"].read(tmp_path)
    assert first.group == second.group and first.pictures[0].name != second.pictures[0].name
    table(
        tmp_path / "MME.tsv",
        [{"index": i, **row, "image_path": f"{i // 2}.png"} for i, row in enumerate([*rows, *rows])],
    )
    examples = prepare(find_tasks("mme")[0], tmp_path).examples
    assert examples[0].group == examples[1].group != examples[2].group == examples[3].group


def test_what_cannot_be_scored_is_refused(tmp_path: Path):
    """An image of MME without its second question; VQA with the answer of one person."""
    table(tmp_path / "MME.tsv", [{"index": 1, "image": png("red"), "category": "color", **YES_NO[0]}])
    picture(tmp_path / "1.png")
    question = {"image": "1.png", "question": "q?", "question_id": 1, "answer": "a"}
    jsonl(tmp_path / "own.jsonl", [question])
    for named, message in (
        ("mme", r"MME\.tsv: MME color, image .*: 1 questions, and acc\+ needs two of each image"),
        (f"textvqa_val={tmp_path / 'own.jsonl'}", r"own\.jsonl: example 1: VQA accuracy needs .* several people"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(find_tasks(named)[0], tmp_path)


def test_a_metric_that_reads_no_right_answer_is_refused():
    """Whatever the reason, a scorer that gives the truth 0 points is not a score."""
    example = Example("1", (("human", "?"),), truths=("Yes.",))
    with pytest.raises(DataError, match=r"gqa scores even right answers as 0, e\.g\. 'Yes\.' of example 1"):
        check("gqa", [example])
    check("gqa", [example, dataclasses.replace(example, id="2", truths=("Yes",))])


def test_right_answers_that_mathvista_would_not_recognise_are_said(tmp_path: Path):
    """Its truths are options' texts, and numbers as they are rounded; a judge is not asked."""
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": "['3', '4']"}
    number = {"question_type": "free_form", "answer_type": "float", "precision": 2}
    text = {"question_type": "free_form", "answer_type": "text", "answer": "a wall"}
    rows = [{**choice, "answer": "B"}, {**choice, "answer": "4"}, {**number, "answer": "1.25"}, text]
    common = {"image": png("red"), "question": "?"}
    [task] = find_tasks("mathvista")
    table(tmp_path / "MathVista_MINI.tsv", [{"index": i, **common, **row} for i, row in enumerate(rows)])
    [note] = prepare(task, tmp_path).notes
    assert "1 of 4 right answers, e.g. 'B' of example 0, would be scored as wrong" in note
    table(tmp_path / "MathVista_MINI.tsv", [{"index": i, **common, **row} for i, row in enumerate(rows[1:])])
    assert prepare(task, tmp_path).notes == []
    table(tmp_path / "MathVista_MINI.tsv", [{"index": 0, **common, **number, "answer": "1,25"}])
    with pytest.raises(DataError, match=r"math_vista scores even right answers as 0, e\.g\. '1,25' of example 0"):
        prepare(task, tmp_path)


def test_a_headline_that_no_answer_could_raise_is_said():
    """CIDEr counts n-grams that some image lacks, so one image has none; F1 of a yes needs one that is right."""
    one = Example("1", (("human", "?"),), truths=("a red wall",))
    for metric, truth, headline in (("captions", "a red wall", "CIDEr"), ("pope", "no", "f1")):
        same = [dataclasses.replace(one, id=str(number), truths=(truth,)) for number in range(3)]
        for examples in (same[:1], same):
            assert check(metric, examples) == [f"{headline} is 0 even for the right answers of these examples"]
    assert check("captions", [one, dataclasses.replace(one, id="2", truths=("two dogs",))]) == []


def test_answers_without_their_annotations_are_refused_or_said(tmp_path: Path):
    picture(tmp_path / "docvqa/1.png")
    file = jsonl(tmp_path / "docvqa/val.jsonl", [{"image": "1.png", "question": "q", "question_id": 9, "answer": "a"}])
    with pytest.raises(DataError, match=r"val\.jsonl: no question has more .*val_v1\.0\.json, .*add it"):
        prepare(find_tasks("docvqa_val")[0], tmp_path)
    [note] = prepare(find_tasks(f"docvqa_val={file}")[0], tmp_path).notes
    assert "docvqa/val/val_v1.0.json" in note and str(file) in note


def test_circular_scores_are_of_questions_in_their_orders(data: Path):
    """None in a second order: no such score. Some in too few: said."""
    [task] = find_tasks("mmbench_dev_en")
    rows = (data / "MMBench_DEV_EN.tsv").read_text().splitlines(keepends=True)
    (data / "MMBench_DEV_EN.tsv").write_text("".join(rows[:-1]))
    [few] = prepare(task, data).notes
    assert "1 of 4 questions, e.g. 3, occur in fewer orders" in few
    (data / "MMBench_DEV_EN.tsv").write_text("".join(rows[:5]))
    [none] = prepare(task, data).notes
    assert "MMBench_DEV_EN.tsv: no question occurs in several orders" in none


def test_all_missing_files_are_named_with_the_way_out(data: Path):
    tasks = find_tasks("zero_shot")
    with pytest.raises(DataError) as found:
        need_files(tasks, data)
    text = str(found.value)
    assert all(f"({name})" in text for name in ("flickr30k", "nocaps", "vqav2_val")) and "(coco)" not in text
    assert text.endswith("give the file as TASK=FILE, or leave out what is missing: --tasks=coco")
    need_files(find_tasks("coco,flickr30k=mine.json"), data)
