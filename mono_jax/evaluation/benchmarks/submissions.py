"""Files to submit, in the format of each benchmark's server, for test sets whose right answers are hidden.

An example's id is the value of the format's column in ``KEYS``; VizWiz goes by the names of pictures.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from mono_jax.errors import ConfigError
from mono_jax.evaluation.benchmarks.reading.columns import is_picture
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics import choices, mmmu

Answers = Sequence[tuple[Example, str]]
Table = list[list[str | int]]


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _vqa(answers: Answers) -> Any:
    """EvalAI (VQAv2, TextVQA)."""
    return [{"question_id": _number(example.id), "answer": answer} for example, answer in answers]


def _vizwiz(answers: Answers) -> Any:
    return [{"image": Path(example.pictures[0].name).name, "answer": answer} for example, answer in answers]


def _docvqa(answers: Answers) -> Any:
    """The Robust Reading Competition (DocVQA, InfoVQA)."""
    return [{"questionId": _number(example.id), "answer": answer} for example, answer in answers]


def _captions(answers: Answers) -> Any:
    """EvalAI (nocaps), in the format of COCO's results."""
    return [{"image_id": _number(example.id), "caption": answer} for example, answer in answers]


def _mmmu(answers: Answers) -> Any:
    return {e.id: mmmu.choice_of(answer, e.options) or answer if e.options else answer for e, answer in answers}


def _mmbench(answers: Answers) -> Table:
    """The table that OpenCompass reads, with one row per order of the options (each is a separate question)."""
    letters = "ABCD"
    rows: Table = [["index", "question", *letters, "prediction"]]
    for example, answer in answers:
        texts = [example.options.get(letter, "") for letter in letters]
        prediction = choices.choice_of(answer, example.options) or answer
        rows.append([_number(example.id), example.fields["text"], *texts, prediction])
    return rows


FORMATS: Mapping[str, Callable[[Answers], Any]] = {
    "vqa": _vqa,
    "vizwiz": _vizwiz,
    "docvqa": _docvqa,
    "captions": _captions,
    "mmmu": _mmmu,
}
TABLES: Mapping[str, Callable[[Answers], Table]] = {"mmbench": _mmbench}
# The columns by which each format says what was answered, the first that a row has.
KEYS: Mapping[str, tuple[str, ...]] = {
    "vqa": ("question_id",),
    "docvqa": ("questionId", "question_id"),
    "captions": ("image_id", "id"),
    "mmmu": ("id",),
    "mmbench": ("index",),
}


def lacking(format_: str, values: Mapping[str, Any], example: Example) -> str:
    """What a row with hidden answers lacks for its answer to be submitted; "" if nothing."""
    if format_ in KEYS:
        return "" if any(name in values for name in KEYS[format_]) else f"no {' or '.join(KEYS[format_])}"
    named = any(is_picture(picture.name) for picture in example.pictures[:1])
    return "" if named else "no picture with a name like 1.jpg, as image or image_path"


def check(format_: str) -> None:
    """Raises ConfigError, before anything is answered, if the package that writes the format is not installed."""
    if format_ in TABLES and importlib.util.find_spec("openpyxl") is None:
        raise ConfigError(
            "hidden test sets of MMBench are submitted as .xlsx, which needs openpyxl: pip install -e '.[xlsx]'"
        )


def write(folder: Path, format_: str, answers: Answers) -> Path:
    """Writes FOLDER/submission.json or .xlsx. Raises OSError; ConfigError as ``check``."""
    check(format_)
    if format_ in TABLES:
        file = folder / "submission.xlsx"
        publish.write_bytes(file, _workbook(TABLES[format_](answers)))
    else:
        file = folder / "submission.json"
        publish.write_text(file, json.dumps(FORMATS[format_](answers), ensure_ascii=False) + "\n")
    return file


def _workbook(rows: Table) -> bytes:
    """The bytes of an .xlsx file with one sheet."""
    import openpyxl
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = openpyxl.Workbook()
    for number, row in enumerate(rows, 1):
        for column, value in enumerate(row, 1):
            cell = book.active.cell(number, column)
            cell.value = ILLEGAL_CHARACTERS_RE.sub(" ", value) if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"  # text, even if it begins with "=" like a formula
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()
