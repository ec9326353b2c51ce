"""Small files in the layout of each benchmark: names and columns as published, not as the catalogue has them."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

COLOURS = ("red", "green", "blue", "white")
CAPTION = "one-sentence caption"
# The benchmarks whose scores depend on more than a right answer.
TASKS = ("pope", "mme", "mmbench_dev_en", "hallusionbench", "textvqa_val", "refcoco_val", "coco", "mmmu_val")


class Small(NamedTuple):
    """What an example is to be; ``pictures``: their colours; ``asked``: a part of the prompt."""

    id: str
    truths: tuple[str, ...]
    pictures: tuple[str, ...]
    asked: str
    category: str = ""
    options: Mapping[str, str] = {}


Layout = Callable[[Path], list[Small]]  # writes the files below a folder
Row = dict[str, Any]


def write(folder: Path) -> Path:
    """All of ``TASKS``, with four images each; no image has a name."""
    for name in TASKS:
        LAYOUTS[name](folder)
    return folder


@functools.cache
def png(colour: str) -> str:
    """Base64."""
    data = io.BytesIO()
    Image.new("RGB", (40, 24), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def table(file: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    file.write_text("".join("\t".join(line) + "\n" for line in lines))


# ------------------------------------------------------------------ files, with pictures in files


def _files(expected: list[Small], content: Mapping[str, Any]) -> Layout:
    """``content``: {file: its JSON, or the rows of JSONL}."""

    def layout(folder: Path) -> list[Small]:
        for number, colour in enumerate(COLOURS):
            (folder / f"{number}.png").write_bytes(base64.b64decode(png(colour)))
        for name, value in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            rows = value if name.endswith(".jsonl") else [value]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return expected

    return layout


def questions(file: str, answers: str = "", annotations: str = "") -> Layout:
    """InternVL's questions. ``answers``: "" = hidden, "one" = in the rows, or annotations: "people", "documents"."""
    truths = {
        "": lambda colour: (),
        "one": lambda colour: (colour,),
        "people": lambda colour: (colour,) * 8 + ("a wall",) * 2,
        "documents": lambda colour: (colour, f"a {colour}"),
    }[answers]
    rows, listed, expected = [], [], []
    for number, colour in enumerate(COLOURS):
        row = {"image": f"data/{number}.png", "question": "colour?", "question_id": number}
        rows.append(row | ({"answer": colour} if answers == "one" else {}))
        given = truths(colour)
        people = {"question_id": number, "answers": [{"answer": each} for each in given]}
        listed.append(people if answers == "people" else {"questionId": number, "answers": given})
        expected.append(Small(str(number), given, (colour,), "colour?"))
    others = {annotations: {"annotations" if answers == "people" else "data": listed}} if annotations else {}
    return _files(expected, {file: rows, **others})


def boxes(file: str) -> Layout:
    box = {"bbox": [4, 4, 36, 20], "width": 40, "height": 24}
    rows = [{"image": f"data/{number}.png", "sent": f"the {c} wall", **box} for number, c in enumerate(COLOURS)]
    right = ("<box>[[100, 167, 900, 833]]</box>",)
    expected = [Small(str(number + 1), right, (c,), f"<ref>the {c} wall</ref>") for number, c in enumerate(COLOURS)]
    return _files(expected, {file: rows})


def captions(file: str, kind: str = "list") -> Layout:
    """``kind``: a "list" of pictures with their captions, "coco" with both apart, or "hidden" captions."""
    given = [(f"a wall in {colour}", f"all of it is {colour}") for colour in COLOURS]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
    pairs = [{"image_id": number, "caption": text} for number, texts in enumerate(given) for text in texts]
    value: Any = {
        "list": [{"image": f"{number}.png", "caption": texts} for number, texts in enumerate(given)],
        "coco": {"images": images, "annotations": pairs},
        "hidden": {"images": images},
    }[kind]
    expected = [
        Small(str(number + (kind == "list")), () if kind == "hidden" else given[number], (colour,), CAPTION)
        for number, colour in enumerate(COLOURS)
    ]
    return _files(expected, {file: value})


def records(file: str) -> Layout:
    """LLaVA's."""
    rows, expected = [], []
    for number, colour in enumerate(COLOURS):
        turns = [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": f"q{number}", "image": f"{number}.png", "kind": "wall", "conversations": turns})
        expected.append(Small(f"q{number}", (colour,), (colour,), "colour?", "wall"))
    return _files(expected, {file: rows})


# ------------------------------------------------------------------ VLMEvalKit's tables


Rows = Iterator[tuple[Row, Small | None]]  # None: the row is to be left out


def _table(file: str, made: Rows, *columns: str) -> Layout:
    """``columns``: more of them, whose values are their names. The first is the category to report."""
    rows, expected = zip(*made)
    more = {name: name for name in reversed(columns)}

    def layout(folder: Path) -> list[Small]:
        table(folder / file, [more | row for row in rows])
        return [each._replace(category=columns[0] if columns else "") for each in expected if each]

    return layout


def short(several: bool = False) -> Rows:
    for number, colour in enumerate(COLOURS):
        truths = (colour, f"a {colour}") if several else (colour,)
        row = {"index": number, "image": png(colour), "question": "colour?"}
        answer = str(list(truths)) if several else colour
        yield row | {"answer": answer}, Small(str(number), truths, (colour,), "colour?")


def yes_no() -> Rows:
    """Two questions about each image."""
    for (i, colour), j in itertools.product(enumerate(COLOURS), range(2)):
        question, truth = f"is it {(colour, 'black')[j]}?", ("Yes", "No")[j]
        row = {"index": 2 * i + j, "image": png(colour), "question": question, "answer": truth}
        yield row, Small(str(2 * i + j), (truth,), (colour,), question)


def sets() -> Rows:
    """HallusionBench's: the index names set, figure and question."""
    for row, small in yes_no():
        i, j = divmod(row["index"], 2)
        index = f"VD_color_0_{i // 2}_{i}_{j}"
        yield {**row, "index": index, "answer": 1 - j}, small._replace(id=index, truths=(("yes", "no")[j],))


def choice(orders: int = 1, hidden: bool = False) -> Rows:
    """With several ``orders``, the later ones refer to the first one's picture."""
    for order, (number, colour) in itertools.product(range(orders), enumerate(COLOURS)):
        index = number + 1_000_000 * order
        options = dict(zip("AB", (colour, "black")[:: 1 - 2 * order]))
        row = {"index": index, "image": number if order else png(colour), "question": "which?", **options}
        truths = () if hidden else ("AB"[order],)
        row |= {} if hidden else {"answer": truths[0]}
        yield row, Small(str(index), truths, (colour,), "which?", options=options)


def several_pictures(hidden: bool = False) -> Rows:
    """MMMU's: a question of the other split comes first. The server goes by "id"."""
    for number, colour in enumerate(("black", *COLOURS)):
        options = {"A": colour, "B": "grey"}
        row = {"index": number, "image": [png(colour), png("black")], "question": "<image 1> and <image 2>?", **options}
        name = f"{'test' if hidden else 'validation'}_Color_{number}"
        small = Small(name if hidden else str(number), ("A",), (colour, "black"), row["question"], options=options)
        small = small._replace(truths=()) if hidden else small
        row |= {"id": name} | ({} if hidden else {"answer": "A", "split": "validation" if number else "dev"})
        yield row, small if number or hidden else None


def mathematics() -> Rows:
    """MathVista's: "query" is asked."""
    for (row, small), colour in zip(short(), COLOURS):
        row |= {"query": "Hint: look. colour?", "question_type": "multi_choice", "answer_type": "text"}
        options = {"A": colour, "B": "black"}
        row["choices"] = str(list(options.values()))
        yield row, small._replace(asked="Hint: look. colour?", options=options)


def described() -> Rows:
    for row, small in short(several=True):
        yield row, small._replace(asked=CAPTION)


_MMBENCH = ("l2-category", "category")
LAYOUTS: dict[str, Layout] = {  # {benchmark, or BENCHMARK=FILE for a second file}
    "vqav2_val": questions("vqav2/vqav2_val.jsonl", "people", "vqav2/v2_mscoco_val2014_annotations.json"),
    "vqav2_testdev": questions("vqav2/vqav2_testdev.jsonl"),
    "okvqa_val": questions("okvqa/okvqa_val.jsonl", "people", "okvqa/mscoco_val2014_annotations.json"),
    "vizwiz_val": questions("vizwiz/vizwiz_val.jsonl", "people", "vizwiz/vizwiz_val_annotations.json"),
    "vizwiz_test": questions("vizwiz/vizwiz_test.jsonl"),
    "textvqa_val": questions("textvqa/textvqa_val.jsonl", "people", "textvqa/textvqa_val_annotations.json"),
    "textvqa_test": questions("textvqa/textvqa_test.jsonl"),
    "docvqa_val": questions("docvqa/val.jsonl", "documents", "docvqa/val/val_v1.0.json"),
    "docvqa_test": questions("docvqa/test.jsonl"),
    "infovqa_val": questions(
        "infographicsvqa/val.jsonl", "documents", "infographicsvqa/infographicsVQA_val_v1.0_withQT.json"
    ),
    "infovqa_test": questions("infographicsvqa/test.jsonl"),
    "chartqa_human": questions("chartqa/test_human.jsonl", "one"),
    "chartqa_augmented": questions("chartqa/test_augmented.jsonl", "one"),
    "gqa_testdev": questions("gqa/llava_gqa_testdev_balanced_qwen_format.jsonl", "one"),
    "textvqa_tsv": _table("TextVQA_VAL.tsv", short(several=True)),
    "docvqa_tsv": _table("DocVQA_VAL.tsv", short(several=True)),
    "infovqa_tsv": _table("InfoVQA_VAL.tsv", short(several=True)),
    "chartqa_tsv": _table("ChartQA_TEST.tsv", short(), "split", "category"),
    "gqa_tsv": _table("GQA_TestDev_Balanced.tsv", short()),
    "ocrbench": _table("OCRBench.tsv", short(several=True), "category"),
    "ai2d": _table("AI2D_TEST.tsv", choice(), "category"),
    "scienceqa": _table("ScienceQA_TEST.tsv", choice(), "category"),
    "seed_image": _table("SEEDBench_IMG.tsv", choice(), "category"),
    "mmmu_val": _table("MMMU_DEV_VAL.tsv", several_pictures(), *_MMBENCH),
    "mmmu_test": _table("MMMU_TEST.tsv", several_pictures(hidden=True), *_MMBENCH),
    "mmbench_dev_en": _table("MMBench_DEV_EN.tsv", choice(2), *_MMBENCH),
    "mmbench_dev_cn": _table("MMBench_DEV_CN.tsv", choice(2), *_MMBENCH),
    "mmbench_test_en": _table("MMBench_TEST_EN.tsv", choice(2, hidden=True), *_MMBENCH),
    "mmbench_test_cn": _table("MMBench_TEST_CN.tsv", choice(2, hidden=True), *_MMBENCH),
    "ccbench": _table("CCBench.tsv", choice(2), "category"),
    "mme": _table("MME.tsv", yes_no(), "category", "l2-category"),
    "hallusionbench": _table("HallusionBench.tsv", sets(), *_MMBENCH),
    "pope": _table("POPE.tsv", yes_no(), "category", "l2-category"),
    "mathvista": _table("MathVista_MINI.tsv", mathematics(), "task", "category"),
    "mmvet": _table("MMVet.tsv", short(), "category", "l2-category"),
    "coco": captions("coco/annotations/coco_karpathy_test.json"),
    "flickr30k": captions("flickr30k/flickr30k_test_karpathy.json", "coco"),
    "nocaps": captions("nocaps/nocaps_val_4500_captions.json", "coco"),
    "nocaps_test": captions("nocaps/nocaps_test_image_info.json", "hidden"),
    "refcoco_val": boxes("refcoco/refcoco_val.jsonl"),
    "refcoco_testA": boxes("refcoco/refcoco_testA.jsonl"),
    "refcoco_testB": boxes("refcoco/refcoco_testB.jsonl"),
    "refcoco+_val": boxes("refcoco/refcoco+_val.jsonl"),
    "refcoco+_testA": boxes("refcoco/refcoco+_testA.jsonl"),
    "refcoco+_testB": boxes("refcoco/refcoco+_testB.jsonl"),
    "refcocog_val": boxes("refcoco/refcocog_val.jsonl"),
    "refcocog_test": boxes("refcoco/refcocog_test.jsonl"),
    "questions": records("questions.jsonl"),
    "captions": captions("captions.jsonl"),
    "coco=COCO_VAL.tsv": _table("COCO_VAL.tsv", described()),
}
