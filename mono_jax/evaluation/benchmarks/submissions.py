"""Files to be sent in, in the format of each benchmark's server, where the right answers of a test set are hidden."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics import choices, mmmu

Answers = Sequence[tuple[Example, str]]


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


def _mmmu(answers: Answers) -> Any:
    return {e.id: mmmu.choice_of(answer, e.options) or answer if e.options else answer for e, answer in answers}


def _mmbench(answers: Answers) -> str:
    """The table that OpenCompass reads, one row an order of the options; it takes the same columns as .xlsx."""
    letters = "ABCD"
    rows = [["index", "question", *letters, "prediction"]]
    for example, answer in answers:
        texts = [example.options.get(letter, "") for letter in letters]
        prediction = choices.choice_of(answer, example.options) or answer
        rows.append([example.id, example.asked.split("\n")[0], *texts, prediction])
    return "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)


FORMATS: Mapping[str, Callable[[Answers], Any]] = {
    "vqa": _vqa,
    "vizwiz": _vizwiz,
    "docvqa": _docvqa,
    "mmmu": _mmmu,
    "mmbench": _mmbench,
}


def write(folder: Path, format_: str, answers: Answers) -> Path:
    """FOLDER/submission.json or .tsv. Raises OSError."""
    content = FORMATS[format_](answers)
    if isinstance(content, str):
        file = folder / "submission.tsv"
        publish.write_text(file, content)
    else:
        file = folder / "submission.json"
        publish.write_text(file, json.dumps(content, ensure_ascii=False) + "\n")
    return file
