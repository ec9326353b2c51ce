"""From rows to examples: short answers, multiple choice, captions, boxes, conversations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.records.layouts import Reading, from_record
from mono_jax.evaluation.benchmarks.reading import columns
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture
from mono_jax.evaluation.benchmarks.reading.rows import Row
from mono_jax.evaluation.metrics.boxes import text_of

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
CAPTION = "Provide a one-sentence caption for the provided image."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_MANY = 1_000_000  # MMBench numbers the orders of question q: q, q + _MANY, q + 2 * _MANY, ...
_NAMES = ("references", "captions", "caption", "sentences", "raw", *columns.ANSWERS)

Form = Callable[[Row, tuple[Picture, ...]], Example]


def _made(row: Row, pictures: tuple[Picture, ...], asked: str, **rest: Any) -> Example:
    """The part that all forms have in common. Questions about the same picture form one group.

    The id is the number of the row: the benchmark, which sees all rows, replaces it.
    """
    return Example(
        id=str(row.number),
        turns=(("human", asked),),
        pictures=pictures,
        category=rest.pop("category", str(columns.cell(row, columns.CATEGORY) or "")),
        group=pictures[0].same if pictures else "",
        fields=rest.pop("fields", {}) | {"question": asked},
        **rest,
    )


def short(suffix: str = f" {SHORT}") -> Form:
    """An open question and how to answer it. A suffix that the question already ends with is not repeated."""

    def form(row: Row, pictures: tuple[Picture, ...]) -> Example:
        asked = columns.question(row).strip()
        asked = asked if asked.endswith(suffix.strip()) else asked + suffix
        return _made(row, pictures, asked.strip(), truths=columns.answers(row))

    return form


def choice(suffix: str | None = None, open_suffix: str | None = None) -> Form:
    """A question with lettered options, preceded by a hint if there is one; InternVL's layout.

    ``suffix``: None = chosen by the language of the question. ``open_suffix``: for questions without options (MMMU);
    None = such questions are an error.
    """

    def form(row: Row, pictures: tuple[Picture, ...]) -> Example:
        of = columns.options(row)
        asked = columns.question(row).strip()
        if hint := row.values.get("hint"):
            asked = f"{hint}\n{asked}"
        asked += "".join(f"\n{key}. {text}" for key, text in of.items())
        if not of:
            if open_suffix is None:
                raise DataError(f"{row.place}: no options: columns A, B, ... or a list in options are needed")
            return _made(row, pictures, f"{asked}\n{open_suffix}", truths=columns.answers(row))
        ending = suffix or (LETTER_CN if _CHINESE.search(asked) else LETTER)
        return _made(row, pictures, f"{asked}\n{ending}", truths=columns.letter(row, of), options=of)

    return form


def circular(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """MMBench and CCBench. Field "text": the question by itself, for the file to submit."""
    example, index = choice()(row, pictures), columns.cell(row, columns.INDEX)
    try:
        number = int(row.number if index is None else index) % _MANY
    except ValueError:
        raise DataError(f"{row.place}: index is {index!r}: it must be a number") from None
    return dataclasses.replace(example, fields={**example.fields, "question": number, "text": columns.question(row)})


def hallusion(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """HallusionBench, whose index ends with set, figure and question: VD_chart_0_1_2_0."""
    example = short(f" Please answer yes or no. {SHORT}")(row, pictures)
    names = ("set_id", "figure_id", "question_id")
    found = {name: row.values[name] for name in names if name in row.values}
    if len(found) < 3:
        parts = str(row.values.get("index", "")).split("_")
        if len(parts) != 6:
            raise DataError(f"{row.place}: no {', '.join(names)}, and index is not like VD_chart_0_1_2_0")
        found = dict(zip(names, parts[3:]))
    words = tuple({"1": "yes", "0": "no"}.get(truth, truth) for truth in example.truths)
    return dataclasses.replace(example, truths=words, fields={**example.fields, **found})


def math_vista(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """MathVista, asked with its own "query" where there is one. Its only right answer may be a list: "[1, 2, 0]".

    Field "precision": decimals of a float, None where the file does not say.
    """
    asked = str(columns.needed(row, ("query", "question"), "question"))
    fields = {name: row.values.get(name) for name in ("question_type", "answer_type", "precision")}
    for name in ("question_type", "answer_type"):
        if fields[name] is None:
            raise DataError(f"{row.place}: no {name}")
    fields["precision"] = _decimals(row, fields["precision"]) if fields["answer_type"] == "float" else None
    is_choice, truth = fields["question_type"] == "multi_choice", columns.cell(row, columns.ANSWERS)
    of = columns.options(row) if is_choice else {}
    if is_choice and not of:
        raise DataError(f"{row.place}: question_type is multi_choice, but there are no choices: a list is needed")
    truths = () if truth is None else (str(truth),)
    return _made(row, pictures, asked, truths=truths, options=of, fields=fields)


def _decimals(row: Row, value: Any) -> int | None:
    try:
        return None if value is None else int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{row.place}: precision is {value!r}: it must be a number of decimals") from None


def caption(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """One picture, any number of references; a LLaVA record is asked unchanged."""
    if "conversations" in row.values:
        return conversation(row, pictures)
    return _made(row, pictures, CAPTION, truths=columns.answers(row, _NAMES))


def box(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """RefCOCO, as InternVL prepares it: sent, bbox (x1, y1, x2, y2 in pixels), width, height."""
    sentence = columns.needed(row, ("sent", "sentence", "expression"), "sentence")
    fields = {name: columns.needed(row, (name,), name) for name in ("bbox", "width", "height")}
    if not isinstance(fields["bbox"], list) or len(fields["bbox"]) != 4:
        raise DataError(f"{row.place}: bbox is {fields['bbox']!r}: it must be [x1, y1, x2, y2] in pixels")
    try:
        right = text_of([*map(float, fields["bbox"])], float(fields["width"]), float(fields["height"]))
    except (TypeError, ValueError, ArithmeticError):
        raise DataError(f"{row.place}: bbox, width and height are {fields}: they must be numbers, in pixels") from None
    return _made(row, pictures, BOX.format(sentence), truths=(right,), fields=fields)


def conversation(row: Row, pictures: tuple[Picture, ...]) -> Example:
    """A LLaVA record: the turns up to the last answer, which is the right one. "kind" is its category."""
    try:
        record = from_record(row.values, Reading(images=len(pictures)))
    except BadSample as error:
        raise DataError(f"{row.place}: {error.reason} {error.detail}: a LLaVA record is needed") from None
    turns = record.conversations
    if len(turns) < 2 or turns[-1][0] != "gpt":
        raise DataError(f"{row.place}: the last of at least two turns must be the right answer, from gpt")
    made = _made(row, pictures, turns[-2][1], truths=(turns[-1][1].strip(),), category=str(row.values.get("kind", "")))
    return dataclasses.replace(made, turns=turns[:-1])
