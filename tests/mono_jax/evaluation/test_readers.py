"""Readers on small files in the benchmarks' own layouts, and their messages for bad files."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageColor

from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError
from mono_jax.evaluation.benchmarks import submissions
from mono_jax.evaluation.benchmarks.catalogue import BENCHMARKS, GROUPS, find_tasks
from mono_jax.evaluation.benchmarks.preparing import prepare
from mono_jax.evaluation.benchmarks.reading import columns, forms
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.benchmarks.reading.rows import read_rows
from mono_jax.evaluation.metrics import judged
from mono_jax.evaluation.metrics.registry import JUDGED, METRICS, find_metric
from tests.mono_jax.evaluation.small_benchmarks import COLOURS, LAYOUTS, Small


def png(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 8), colour).save(data, "PNG")
    return data.getvalue()


def encoded(colour: str = "red") -> str:
    return base64.b64encode(png(colour)).decode()


def tsv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return file


def jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def as_json(file: Path, value: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return file


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(colour))
    return file


def scored(name: str, examples: Sequence[Example], answers: Sequence[str]) -> float:
    """The headline of the benchmark's metric."""
    metric = METRICS[BENCHMARKS[name].metric]
    return next(iter(metric([e.answered(a) for e, a in zip(examples, answers, strict=True)]).values())).score


def colour_of(data: bytes) -> str:
    pixel = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
    return next(name for name in (*COLOURS, "black") if ImageColor.getrgb(name) == pixel)


@pytest.mark.parametrize("name", [*BENCHMARKS, "coco=COCO_VAL.tsv"])
def test_every_benchmark_is_read_from_files_as_published(tmp_path: Path, name: str):
    expected, benchmark = LAYOUTS[name](tmp_path), BENCHMARKS[name.partition("=")[0]]
    examples = benchmark.read(tmp_path)
    found = [
        Small(e.id, e.truths, tuple(colour_of(p.read()) for p in e.pictures), small.asked, e.category, e.options)
        for e, small in zip(examples, expected, strict=True)
    ]
    assert found == expected and all(small.asked in e.asked for e, small in zip(examples, expected))
    assert benchmark.hides(examples) == (not expected[0].truths)


def test_vlmevalkit_s_tables_reuse_pictures_by_index(tmp_path: Path):
    """MMBench: missing options, a hint, and the orders of a question, whose image is in another row."""
    question = {"question": "what is it?", "hint": "look", "category": "x", "l2-category": "recognition"}
    rows = [
        {"index": 7, "image": encoded(), **question, "A": "cat", "B": "None", "C": "", "answer": "B"},
        {"index": 1_000_007, "image": "7", **question, "A": "None", "B": "cat", "C": "", "answer": "A"},
        {"index": 8, "image": encoded("blue"), **question, "A": "猫", "B": "狗", "C": "", "answer": "A"},
    ]
    tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    first, again, chinese = BENCHMARKS["mmbench_dev_en"].read(tmp_path)
    assert first.turns == (("human", f"look\nwhat is it?\nA. cat\nB. None\n{forms.LETTER}"),)
    assert chinese.asked.endswith(f"\n{forms.LETTER_CN}")
    assert first.pictures == again.pictures and first.pictures[0].read() == png()
    assert chinese.pictures[0].read() == png("blue") and first.digest != chinese.digest
    assert (first.truths, again.truths, first.category) == (("B",), ("A",), "recognition")
    assert scored("mmbench_dev_en", [first, again, chinese], ["B", "A", "A. 猫"]) == 100
    assert scored("mmbench_dev_en", [first, again, chinese], ["B", "B", "A"]) == 50


def test_tables_may_hold_several_pictures_and_lists_of_answers(tmp_path: Path):
    row = {"index": 1, "image": str([encoded(), encoded("blue")]), "question": "<image 1> and <image 2>?"}
    options = {"options": "['4', '5']", "answer": "B"}
    rows = [
        {**row, "split": "dev", **options},
        {**row, "index": 2, "split": "validation", **options},
        {**row, "index": 3, "split": "validation", "options": "[]", "answer": "['12', 'twelve']"},
    ]
    tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    choice, open_question = BENCHMARKS["mmmu_val"].read(tmp_path)
    assert [p.read() for p in choice.pictures] == [png(), png("blue")]
    assert open_question.truths == ("12", "twelve") and open_question.asked.endswith(f"\n{forms.SHORT}")
    assert scored("mmmu_val", [choice, open_question], ["(B)", "it is twelve"]) == 100


def test_vqav2_as_internvl_prepares_it(tmp_path: Path):
    """Questions in JSONL, the answers of ten people in VQA's annotations, paths that begin with data/."""
    picture(tmp_path / "coco/val2014/1.jpg")
    question = {"image": "data/coco/val2014/1.jpg", "question": "what animal?", "question_id": 5}
    jsonl(tmp_path / "vqav2/vqav2_val.jsonl", [question])
    annotations = [{"question_id": 5, "answers": [{"answer": "cat"}] * 2 + [{"answer": "Dog."}] * 8}]
    as_json(tmp_path / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    [example] = BENCHMARKS["vqav2_val"].read(tmp_path)
    assert example.asked == f"what animal? {forms.SHORT}" and len(example.truths) == 10
    assert scored("vqav2_val", [example], ["a dog"]) == 100
    assert scored("vqav2_val", [example], ["cat"]) == pytest.approx(60)


def test_docvqa_s_annotations(tmp_path: Path):
    picture(tmp_path / "docvqa/val/doc.png")
    jsonl(tmp_path / "docvqa/val.jsonl", [{"image": "val/doc.png", "question": "total?", "question_id": 9}])
    as_json(tmp_path / "docvqa/val/val_v1.0.json", {"data": [{"questionId": 9, "answers": ["$ 12", "12"]}]})
    [example] = BENCHMARKS["docvqa_val"].read(tmp_path)
    assert scored("docvqa_val", [example], ["$12"]) == pytest.approx(75)
    as_json(tmp_path / "docvqa/val/val_v1.0.json", {"data": [{"questionId": 8, "answers": ["12"]}]})
    with pytest.raises(DataError, match=r"val_v1\.0\.json: no annotation of question 9"):
        BENCHMARKS["docvqa_val"].read(tmp_path)


def test_coco_captions(tmp_path: Path):
    """COCO's own layout, and Karpathy's list."""
    for name in ("1.jpg", "2.jpg"):
        picture(tmp_path / "flickr30k/images" / name)
    value = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((2, "a dog runs"), (1, "a cat"), (1, "one cat"))],
    }
    as_json(tmp_path / "flickr30k/flickr30k_test_karpathy.json", value)
    first, second = BENCHMARKS["flickr30k"].read(tmp_path)
    assert (first.asked, first.truths, second.truths) == (forms.CAPTION, ("a cat", "one cat"), ("a dog runs",))
    picture(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    as_json(
        tmp_path / "coco_karpathy_test.json",
        [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["a", "b"]}],
    )
    [example] = BENCHMARKS["coco"].read(tmp_path)
    assert example.truths == ("a", "b")


def test_refcoco_as_internvl_prepares_it(tmp_path: Path):
    picture(tmp_path / "refcoco/1.jpg")
    row = {"image": "1.jpg", "sent": "the cat", "bbox": [64, 96, 192, 192], "width": 640, "height": 480}
    jsonl(tmp_path / "refcoco/refcoco+_testA.jsonl", [row, {**row, "sent": "left cat"}])
    examples = BENCHMARKS["refcoco+_testA"].read(tmp_path)
    assert examples[0].asked.endswith("<ref>the cat</ref>")
    assert scored("refcoco+_testA", examples, ["<box>[[100, 200, 300, 400]]</box>", "no"]) == 50


def test_mme_and_hallusionbench(tmp_path: Path):
    rows = [
        {"index": i, "image": encoded(), "question": "Is it red? Please answer yes or no.", "answer": truth}
        | {"category": "color", "image_path": "color/1.png"}
        for i, truth in enumerate(("Yes", "No"))
    ]
    tsv(tmp_path / "MME.tsv", rows)
    examples = BENCHMARKS["mme"].read(tmp_path)
    assert scored("mme", examples, ["Yes", "No"]) == 200 and scored("mme", examples, ["Yes", "Yes"]) == 50
    row = {"index": "VS_chart_0_1_2_0", "image": encoded(), "question": "Is it?", "answer": "1", "l2-category": "chart"}
    tsv(tmp_path / "HallusionBench.tsv", [row])
    [example] = BENCHMARKS["hallusionbench"].read(tmp_path)
    assert example.truths == ("yes",), "in words, so that always giving it is an answer"
    assert example.fields["figure_id"] == "2" and scored("hallusionbench", [example], ["Yes."]) == 100


@pytest.mark.parametrize("indexed", [True, False])
def test_hallusionbench_with_columns_for_set_figure_and_question(tmp_path: Path, indexed: bool):
    names = ("set_id", "figure_id", "question_id")
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    rows = [
        {**dict(zip(names, place)), "image": encoded(), "question": "Is it?", "answer": 1, "l2-category": "chart"}
        | ({"index": f"VD_{number}"} if indexed else {})
        for number, place in enumerate(places)
    ]
    tsv(tmp_path / "HallusionBench.tsv", rows)
    examples = BENCHMARKS["hallusionbench"].read(tmp_path)
    assert [tuple(int(e.fields[name]) for name in names) for e in examples] == places
    assert scored("hallusionbench", examples, ["yes"] * 4 + ["no"]) == 80


def test_mathvista_and_mmvet(tmp_path: Path):
    row = {"question": "how many?", "question_type": "multi_choice", "answer_type": "text", "choices": "['3', '4']"}
    tsv(tmp_path / "MathVista_MINI.tsv", [{"index": 1, "image": encoded(), **row, "answer": "4", "task": "counting"}])
    [example] = BENCHMARKS["mathvista"].read(tmp_path)
    assert example.options == {"A": "3", "B": "4"} and example.category == "counting"
    picture(tmp_path / "v1_0.png")
    value = {"v1_0": {"image": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "category": "ocr,math"}}
    as_json(tmp_path / "MMVet.json", value)
    [example] = BENCHMARKS["mmvet"].read(tmp_path)
    assert (example.id, example.asked, example.category) == ("v1_0", "x?", "ocr,math")


@pytest.mark.parametrize(
    ("given", "truths"),
    [
        *[
            ("[12]", ("[12]",)),
            ("[1, 2]", ("[1, 2]",)),
            ("['1', 2]", ("['1', 2]",)),
            ("[see page 3]", ("[see page 3]",)),
        ],
        *[("['12', 'twelve']", ("12", "twelve")), ('["12"]', ("12",)), ("['a', {'answer': 'b'}]", ("a", "b"))],
        *[("[", ("[",)), ("[1][0]", ("[1][0]",)), ("[]", ()), (["x", 12], ("x", "12")), (12, ("12",)), (None, ())],
    ],
)
def test_text_is_several_right_answers_only_if_it_is_a_list_of_texts(tmp_path: Path, given: Any, truths: tuple):
    picture(tmp_path / "1.png")
    jsonl(tmp_path / "DocVQA_VAL.jsonl", [{"image": "1.png", "question": "q", "answer": given}])
    [row] = read_rows(tmp_path / "DocVQA_VAL.jsonl")
    assert columns.answers(row) == forms.caption(row, ()).truths == truths


@pytest.mark.parametrize("truth", ["[1, 2, 0]", [1, 2, 0], "['a', 'b']"])
def test_a_list_is_one_answer_in_mathvista(tmp_path: Path, truth: Any):
    picture(tmp_path / "1.png")
    row = {"image": "1.png", "question": "q", "question_type": "free_form", "answer_type": "list", "answer": truth}
    jsonl(tmp_path / "MathVista_MINI.jsonl", [row])
    [example] = BENCHMARKS["mathvista"].read(tmp_path)
    judge = judged.Memory(type("Copies", (), {"name": "copies", "__call__": lambda self, prompt: str(truth)})())
    assert find_metric("math_vista", judge)([example.answered(str(truth))])["accuracy"].score == 100


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"precision": "2.0"}, ["3.14", "3.1429"]),
        ({"precision": 2}, ["3.14", "3.1429"]),
        ({"precision": ""}, ["3.14", "3.140"]),
        ({}, ["3.14", "3.140"]),
    ],
)
@pytest.mark.parametrize("write", [tsv, jsonl])
def test_floats_of_mathvista(tmp_path: Path, write: Any, given: dict[str, Any], right: list[str]):
    """Rounded to the row's precision; compared as numbers if it has none."""
    row = {"index": 1, "image": encoded(), "question": "pi?", "question_type": "free_form", "answer_type": "float"}
    write(tmp_path / f"MathVista_MINI.{write.__name__}", [row | {"answer": "3.14"} | given])
    [example] = prepare(find_tasks("mathvista")[0], tmp_path).examples
    answers = [example.answered(said) for said in ("3.14", "3.140", "3.1429", "3.2", "")]
    assert {each.answer for each in answers if find_metric("math_vista")([each])["accuracy"].score == 100} == {
        "3.14", "3.140", *right,
    }  # fmt: skip


def test_a_precision_of_mathvista_that_is_no_number_is_named(tmp_path: Path):
    row = {"index": 1, "image": encoded(), "question": "?", "question_type": "free_form", "answer_type": "float"}
    tsv(tmp_path / "MathVista_MINI.tsv", [row | {"answer": "1.5", "precision": "two"}])
    with pytest.raises(DataError, match=r"MathVista_MINI\.tsv:2: precision is 'two': it must be a number of decimals"):
        BENCHMARKS["mathvista"].read(tmp_path)


@pytest.mark.parametrize("choices", [{}, {"choices": "none"}, {"choices": []}, {"choices": "[3, 4"}])
def test_a_choice_of_mathvista_needs_choices(tmp_path: Path, choices: dict[str, Any]):
    picture(tmp_path / "1.png")
    row = {"image": "1.png", "question": "q", "question_type": "multi_choice", "answer_type": "text", "answer": "x"}
    jsonl(tmp_path / "MathVista_MINI.jsonl", [row | choices])
    with pytest.raises(DataError, match=r"MathVista_MINI\.jsonl:1: question_type is multi_choice, but there are no"):
        BENCHMARKS["mathvista"].read(tmp_path)


def test_parquet_as_hugging_face_keeps_it(tmp_path: Path):
    """Pictures as {bytes, path}, options as a list, the answer as a number; columns filled up with nulls."""
    rows = [
        {
            "image": {"bytes": png(), "path": None},
            "question": "which?",
            "choices": ["cat", "dog"],
            "answer": 1,
            "hint": "",
        },
        {"image": None, "question": "and?", "choices": ["1", "2", "3"], "answer": 2, "hint": "sum"},
    ]
    (tmp_path / "ScienceQA_TEST").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ScienceQA_TEST/test-00000.parquet")
    first, second = BENCHMARKS["scienceqa"].read(tmp_path)
    assert (first.truths, second.truths) == (("B",), ("C",))
    assert first.pictures[0].read() == png() and second.pictures == ()
    assert second.asked == f"sum\nand?\nA. 1\nB. 2\nC. 3\n{forms.LETTER}"


def parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("write", [jsonl, as_json, parquet])
@pytest.mark.parametrize("index", [int, str])
def test_vlmevalkit_s_columns_mean_the_same_in_every_kind_of_file(tmp_path: Path, write: Any, index: type):
    """Pictures as base64, as the index of another row, as a list; one task's pictures have names, too."""
    choice = {"question": "which?", "A": "cat", "B": "dog", "answer": "A"}
    images = [encoded(), "7", str([encoded(), encoded("blue")]), encoded("blue")]
    rows = [{"index": index(7 + i), "image": image, **choice} for i, image in enumerate(images)]
    named = [{**row, "category": "x", "answer": "yes", "image_path": f"x/{i // 2}.png"} for i, row in enumerate(rows)]
    suffix = {jsonl: "jsonl", as_json: "json", parquet: "parquet"}[write]
    for name, stem, table in (("ai2d", "AI2D_TEST", rows), ("pope", "POPE", named)):
        expected = BENCHMARKS[name].read(tmp_path, tsv(tmp_path / f"{stem}.tsv", table))
        found = BENCHMARKS[name].read(tmp_path, write(tmp_path / f"{stem}.{suffix}", table))
        assert [[p.read() for p in e.pictures] for e in found] == [
            [png()],
            [png()],
            [png(), png("blue")],
            [png("blue")],
        ]
        assert [(e.id, e.turns, e.truths) for e in found] == [(e.id, e.turns, e.truths) for e in expected]
        groups = [[e.group == other.group for other in examples] for examples in (found, expected) for e in examples]
        assert groups[: len(rows)] == groups[len(rows) :]


@pytest.mark.parametrize(
    ("image", "pictures"),
    [
        ([encoded(), encoded("blue")], [png(), png("blue")]),
        (f"data:image/png;base64,{encoded()}", [png()]),
        ([f"data:image/png;base64,{encoded()}", "1.png"], [png(), png("blue")]),
        (f"{'./' * 40}1.png", [png("blue")]),
        (f"{'pictures/' * 9}blue", [png("blue")]),
    ],
)
def test_pictures_in_json_may_be_encoded_or_named(tmp_path: Path, image: Any, pictures: list[bytes]):
    for name in ("1.png", f"{'pictures/' * 9}blue"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png("blue"))
    jsonl(tmp_path / "POPE.jsonl", [{"index": 1, "image": image, "question": "q", "answer": "yes", "category": "x"}])
    [example] = BENCHMARKS["pope"].read(tmp_path)
    assert [each.read() for each in example.pictures] == pictures
    assert len({each.name for each in example.pictures}) == len(pictures)


@pytest.mark.parametrize("image", ["no.png", "9", "x" * 300 + ".png", "nul\0.png"])
def test_a_picture_that_is_not_there_is_named(tmp_path: Path, image: str):
    jsonl(tmp_path / "POPE.jsonl", [{"index": 1, "image": image, "question": "q", "answer": "yes", "category": "x"}])
    with pytest.raises(DataError, match=r"POPE\.jsonl:1: .*: no such picture below"):
        BENCHMARKS["pope"].read(tmp_path)


def test_one_s_own_questions_may_have_several_turns_or_no_picture(tmp_path: Path):
    picture(tmp_path / "1.png")
    turns = [("human", "<image>\nhi"), ("gpt", "yes?"), ("human", "what is it?"), ("gpt", " cat ")]
    record = {"id": "a", "image": "1.png", "kind": "k", "conversations": [{"from": f, "value": v} for f, v in turns]}
    text = {"id": "b", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}
    jsonl(tmp_path / "questions.jsonl", [record, text])
    first, second = BENCHMARKS["questions"].read(tmp_path)
    assert first.turns == tuple(turns[:3]) and (first.truths, first.category) == (("cat",), "k")
    assert second.pictures == () and second.asked == "1 + 1?"


GOOD = {"index": 1, "image": encoded(), "question": "q", "A": "x", "B": "y", "answer": "A"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": ""}, r"AI2D_TEST\.tsv:2: no question: one of question, query, .* is needed, found A, B"),
        ({"A": "", "B": ""}, r"AI2D_TEST\.tsv:2: no options: columns A, B, \.\.\. or a list in options"),
        ({"answer": "Q"}, r"AI2D_TEST\.tsv:2: the answer is 'Q': it must be one of A, B, or an option"),
        ({"answer": ""}, r"AI2D_TEST\.tsv: example 1 has no right answer, and multiple_choice needs one"),
        ({"image": "9"}, r"AI2D_TEST\.tsv:2: image names row '9', which does not precede it"),
        ({"image": "%" * 80}, r"AI2D_TEST\.tsv:2: image is not base64"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, changes: dict[str, str], message: str):
    tsv(tmp_path / "AI2D_TEST.tsv", [GOOD | changes])
    with pytest.raises(DataError, match=message):
        BENCHMARKS["ai2d"].read(tmp_path)


def test_bad_files_are_named(tmp_path: Path):
    benchmark = BENCHMARKS["ai2d"]
    with pytest.raises(DataError, match=r"has none of AI2D_TEST\.tsv, .* give the file as TASK=FILE"):
        benchmark.read(tmp_path)
    tsv(tmp_path / "AI2D_TEST.tsv", [GOOD, GOOD])
    with pytest.raises(DataError, match="id '1' occurs twice"):
        benchmark.read(tmp_path)
    tables = {
        "x.tsv": ("a\tb\n1\n", "x.tsv:2: 1 cells, but the header has 2"),
        "x.jsonl": ('{"id": 1}\n{"id"', "x.jsonl:2: not JSON"),
        "x.json": ("3", "x.json: neither a list nor an object"),
        "y.jsonl": ("[1]\n", "y.jsonl:1: list instead of an object"),
        "x.parquet": ("PAR1", "x.parquet: not a complete Parquet file"),
        "x.csv": ("", "x.csv: unknown kind of file"),
    }
    for name, (content, message) in tables.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message.replace(".", r"\.")):
            list(read_rows(tmp_path / name))
    jsonl(tmp_path / "questions.jsonl", [{"id": 1, "image": "no.png", "conversations": []}])
    with pytest.raises(DataError, match=r"questions\.jsonl:1: no\.png: no such picture below"):
        BENCHMARKS["questions"].read(tmp_path)


def test_hidden_answers_become_files_to_send_in(tmp_path: Path):
    picture(tmp_path / "vizwiz/test/1.jpg")
    questions = [{"image": "test/1.jpg", "question": "q", "question_id": 4}]
    jsonl(tmp_path / "vizwiz/vizwiz_test.jsonl", questions)
    jsonl(tmp_path / "vqav2/vqav2_testdev.jsonl", [{**questions[0], "image": "../vizwiz/test/1.jpg"}])
    for name in ("textvqa/textvqa_test", "docvqa/test", "infographicsvqa/test"):
        jsonl(tmp_path / f"{name}.jsonl", [{**questions[0], "image": "vizwiz/test/1.jpg"}])
    images = [{"id": 4, "file_name": "vizwiz/test/1.jpg"}]
    as_json(tmp_path / "nocaps/nocaps_test_image_info.json", {"images": images, "licenses": []})
    expected = {
        "vizwiz_test": [{"image": "1.jpg", "answer": "cat"}],
        "vqav2_testdev": [{"question_id": 4, "answer": "cat"}],
        "textvqa_test": [{"question_id": 4, "answer": "cat"}],
        "docvqa_test": [{"questionId": 4, "answer": "cat"}],
        "infovqa_test": [{"questionId": 4, "answer": "cat"}],
        "nocaps_test": [{"image_id": 4, "caption": "cat"}],
    }
    for name, content in expected.items():
        [example] = BENCHMARKS[name].read(tmp_path)
        assert BENCHMARKS[name].hides([example])
        file = submissions.write(tmp_path / name, BENCHMARKS[name].submission, [(example, "cat")])
        assert json.loads(file.read_text()) == content


def test_hidden_answers_of_mmmu_are_letters_where_there_are_options(tmp_path: Path):
    """{id: letter or text}; answers that name no option are passed unchanged. MMMU's ids are not VLMEvalKit's index."""
    row = {"image": encoded(), "question": "q"}
    choice, open_question = {**row, "A": "x", "B": "y"}, {**row, "options": "[]"}
    rows = [{"index": i, "id": f"test_Art_{i + 7}", **r} for i, r in enumerate((choice, choice, open_question))]
    tsv(tmp_path / "MMMU_TEST.tsv", rows)
    examples = BENCHMARKS["mmmu_test"].read(tmp_path)
    assert BENCHMARKS["mmmu_test"].hides(examples)
    file = submissions.write(tmp_path, "mmmu", list(zip(examples, ["It is (B).", "neither", "12 m"])))
    assert json.loads(file.read_text()) == {"test_Art_7": "B", "test_Art_8": "neither", "test_Art_9": "12 m"}


@pytest.mark.parametrize(
    ("name", "file", "lacking"),
    [
        ("mmmu_test", "MMMU_TEST.tsv", "no id"),
        ("mmbench_test_en", "MMBench_TEST_EN.tsv", "no index"),
        ("vqav2_testdev", "vqav2_testdev.tsv", "no question_id"),
        ("textvqa_test", "textvqa_test.tsv", "no question_id"),
        ("docvqa_test", "test.tsv", "no questionId or question_id"),
        ("infovqa_test", "test.tsv", "no questionId or question_id"),
        ("nocaps_test", "nocaps.tsv", "no image_id or id"),
        ("vizwiz_test", "vizwiz_test.tsv", r"no picture with a name like 1\.jpg, as image or image_path"),
    ],
)
def test_a_file_without_what_the_server_goes_by_is_refused(tmp_path: Path, name: str, file: str, lacking: str):
    """Other columns that usually hold ids will not do; where the answers are not hidden, they will."""
    keys = ("index", "id", "question_id", "questionId", "image_id")
    needed = {"no id": {"id": "test_Art_1"}, "no index": {"index": 1}, "no question_id": {"question_id": 1}}
    given = needed.get(lacking, {"questionId": 1, "image_id": 1, "image_path": "a/1.jpg"})
    row = {"image": encoded(), "question": "q", "A": "x", "B": "y"}
    others = {key: 5 for key in keys if key not in lacking.split()}
    tsv(tmp_path / file, [row | others])
    with pytest.raises(DataError, match=rf"{file}:2: {lacking}: the server that scores the answers goes by it"):
        BENCHMARKS[name].read(tmp_path, tmp_path / file)
    tsv(tmp_path / file, [row | others | given])
    [example] = BENCHMARKS[name].read(tmp_path, tmp_path / file)
    sent = submissions.write(tmp_path, BENCHMARKS[name].submission, [(example, "x")])
    if sent.suffix == ".json":
        assert str(next(iter(given.values()))).split("/")[-1] in sent.read_text() and "5" not in sent.read_text()
    tsv(tmp_path / file, [row | others | {"answer": "A"}])
    assert len(BENCHMARKS[name].read(tmp_path, tmp_path / file)) == 1


def as_images(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As the datasets library stores pictures: without a name."""
    return [{**row, "image": {"bytes": png(row["image"]), "path": None}} for row in rows]


def test_mme_with_one_question_id_for_both_questions_of_an_image(tmp_path: Path):
    """lmms-lab's layout, in two files. Two images of one category look the same."""
    rows = [
        {"question_id": f"code_reasoning/{i}.png", "image": colour, "question": f"is it {asked}?", "answer": truth}
        | {"category": "code_reasoning"}
        for i, colour in enumerate(("red", "blue", "red"))
        for asked, truth in ((colour, "Yes"), ("black", "No"))
    ]
    (tmp_path / "MME").mkdir()
    parquet(tmp_path / "MME/test-0.parquet", as_images(rows[:3]))
    parquet(tmp_path / "MME/test-1.parquet", as_images(rows[3:]))
    examples = prepare(find_tasks("mme")[0], tmp_path).examples
    assert [example.id for example in examples] == list("123456")
    assert [len({e.group for e in examples[i : i + 2]}) for i in (0, 2, 4)] == [1, 1, 1]
    assert scored("mme", examples, ["Yes", "No"] * 3) == 200
    assert scored("mme", examples, ["Yes", "Yes"] + ["Yes", "No"] * 2) == pytest.approx(100 * (5 / 6 + 2 / 3))
    parquet(tmp_path / "MME/test-1.parquet", as_images([*rows[3:], rows[0]]))
    with pytest.raises(DataError, match=r"test-1\.parquet:4: id 'code_reasoning/0\.png' occurs twice with the same"):
        BENCHMARKS["mme"].read(tmp_path)


@pytest.mark.parametrize("id_is_unique", [True, False])
def test_pope_with_ids_that_count_within_a_category(tmp_path: Path, id_is_unique: bool):
    """The same question is asked in each of them: the column that tells rows apart is taken, or their numbers."""
    rows = [
        {"id": f"r{number if id_is_unique else i}", "question_id": str(i), "image": colour, "question": "is it red?"}
        | {"answer": "yes" if colour == "red" else "no", "category": category}
        for number, (category, (i, colour)) in enumerate(
            itertools.product(("random", "popular"), enumerate(("red", "blue")))
        )
    ]
    parquet(tmp_path / "POPE.parquet", as_images(rows))
    examples = BENCHMARKS["pope"].read(tmp_path)
    assert [example.id for example in examples] == (["r0", "r1", "r2", "r3"] if id_is_unique else list("1234"))
    assert scored("pope", examples, ["yes", "no"] * 2) == 100
    assert [e.id for e in BENCHMARKS["pope"].read(tmp_path, limit=2)] == [e.id for e in examples[:2]]


def test_ids_that_others_go_by_must_be_unique(tmp_path: Path):
    """Annotations, servers, and the orders of a question of MMBench."""
    picture(tmp_path / "docvqa/1.png")
    row = {"image": "1.png", "question": "q", "question_id": 9, "id": 1}
    jsonl(tmp_path / "docvqa/val.jsonl", [row, {**row, "question": "p", "id": 2}])
    as_json(tmp_path / "docvqa/val/val_v1.0.json", {"data": [{"questionId": n, "answers": ["a", "b"]} for n in (9, 1)]})
    jsonl(tmp_path / "docvqa/test.jsonl", [row, {**row, "question": "p", "id": 2}])
    tsv(tmp_path / "MMBench_DEV_EN.tsv", [{**GOOD, "id": 1}, {**GOOD, "id": 2, "question": "p"}])
    for name, repeated in (("docvqa_val", "9"), ("docvqa_test", "9"), ("mmbench_dev_en", "1")):
        with pytest.raises(DataError, match=f"id '{repeated}' occurs twice: ids must be unique"):
            BENCHMARKS[name].read(tmp_path)


def test_hidden_answers_of_mmbench_become_a_workbook(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    row = {key: value for key, value in GOOD.items() if key != "answer"} | {"hint": "look\nclosely"}
    formula = {**row, "index": 1000001, "question": "=1+1 is", "A": "=2", "B": "#N/A"}
    long = {**row, "index": 2, "question": "first\nsecond"}
    tsv(tmp_path / "MMBench_TEST_EN.tsv", [row, formula, long])
    answers = zip(BENCHMARKS["mmbench_test_en"].read(tmp_path), ["(B)", "neither\x07", "A"])
    sheet = openpyxl.load_workbook(submissions.write(tmp_path / "m", "mmbench", list(answers))).active
    assert [[cell.value for cell in row] for row in sheet] == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        [1, "q", "x", "y", None, None, "B"],
        [1000001, "=1+1 is", "=2", "#N/A", None, None, "neither "],
        [2, "first\nsecond", "x", "y", None, None, "A"],
    ]
    assert {cell.data_type for row in sheet for cell in row if isinstance(cell.value, str)} == {"s"}


def test_a_missing_package_is_named_before_anything_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs openpyxl: pip install -e '\.\[xlsx\]'"):
        submissions.check("mmbench")
    submissions.check("vqa")


def test_tasks_are_named_by_name_group_pattern_and_file():
    assert [task.name for task in find_tasks("zero_shot")] == list(GROUPS["zero_shot"])
    assert {task.name for task in find_tasks("mmbench*,mme")} >= {"mmbench_dev_en", "mmbench_test_cn", "mme"}
    own, other = find_tasks("easy:questions=a.jsonl,questions=b.jsonl")
    assert (own.name, own.file, other.name, other.file) == ("easy", Path("a.jsonl"), "questions", Path("b.jsonl"))
    with pytest.raises(ConfigError, match=r"unknown task 'mm'.*mme"):
        find_tasks("mm")


@pytest.mark.parametrize(
    ("named", "repeated"),
    [
        ("questions=a.jsonl,questions=b.jsonl", "questions"),
        ("questions,questions=b.jsonl", "questions"),
        ("x:zero_shot", "x"),
        ("x:mme*,x:pope", "x"),
        ("mme:questions=a.jsonl,mme", "mme"),
    ],
)
def test_two_tasks_of_one_name_are_refused(named: str, repeated: str):
    with pytest.raises(ConfigError, match=f"two tasks are called '{repeated}': give each its own as LABEL:TASK=FILE"):
        find_tasks(named)


def test_a_task_named_twice_is_one():
    assert [task.name for task in find_tasks("coco,zero_shot,mme,mm?,mme")] == [*GROUPS["zero_shot"], "mme"]


def test_every_benchmark_and_metric_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    missing = [name for name in (*BENCHMARKS, *GROUPS, *METRICS, *JUDGED) if f"`{name}`" not in text]
    files = [part for b in BENCHMARKS.values() for part in (b.annotations, b.files[0]) if part]
    missing += [file for file in files if file not in text and "refcoco" not in file]
    assert not missing


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_metric_and_a_format(name: str):
    benchmark = BENCHMARKS[name]
    assert benchmark.metric in {*METRICS, *JUDGED} and benchmark.submission in {
        None,
        *submissions.FORMATS,
        *submissions.TABLES,
    }
