"""Questions with changed pictures and arrangements, as files that ``experiments/evaluate.py`` can also read.

FOLDER/NAME@LEVEL.jsonl     LLaVA records         FOLDER/pictures/NAME@LEVEL/*.png     their pictures
                                                  FOLDER/pictures/edge_EDGE/*.png      all pictures, reduced

A picture is named after the question's id and the bytes that it is made from, so one that is already there is the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.encoding.chat import IMAGE
from data_pipelines.errors import DataError
from data_pipelines.io import publish
from data_pipelines.io.digests import digest
from mono_jax.errors import unknown_key
from mono_jax.evaluation.questions import Question, opened
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES, scaled


def write(folder: Path, questions: Sequence[Question], names: Sequence[str] | None = None) -> dict[str, Path]:
    """{"NAME@LEVEL": file} for all changes, or those in ``names``; pictures of an earlier call are kept.

    Raises ConfigError for an unknown name, DataError that names the picture.
    """
    files = {}
    for name in names or ():
        if name not in CHANGES and name not in ARRANGEMENTS:
            raise unknown_key("change", name, [*CHANGES, *ARRANGEMENTS])
    for table, make in ((CHANGES, _changed), (ARRANGEMENTS, _arranged)):
        chosen = {name: each for name, each in table.items() if not names or name in names}
        for name, level in ((name, level) for name, each in chosen.items() for level in each.levels):
            file = files[f"{name}@{level:g}"] = folder / f"{name}@{level:g}.jsonl"
            records = make(folder, name, level, questions)
            publish.write_text(file, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))
    return files


def _changed(folder: Path, name: str, level: float, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    place = folder / "pictures" / f"{name}@{level:g}"
    for question in questions:
        rng = np.random.default_rng(zlib.crc32(f"{name}/{question.id}".encode()))
        file = _made(place, question, lambda picture, rng=rng: CHANGES[name].apply(picture, level, rng))
        yield _record(question, question.turns[-1][1], [file.relative_to(folder)])


def _arranged(folder: Path, name: str, level: float, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    arrangement = ARRANGEMENTS[name]
    beside = [_reduced(folder, question, arrangement.others_edge) for question in questions]
    for number, question in enumerate(questions):
        others = [*beside[number + 1 :], *beside[:number]]
        asked = question.turns[-1][1].replace(IMAGE, "").strip()
        text, pictures = arrangement.apply(asked, [question.image.absolute()], others, level)
        yield _record(question, text, pictures)


def _reduced(folder: Path, question: Question, edge: int | None) -> Path:
    """The question's picture, with a shorter edge of ``edge`` pixels unless that is None; written once."""
    if edge is None:
        return question.image.absolute()
    return _made(folder / "pictures" / f"edge_{edge}", question, lambda picture: scaled(picture, edge)).absolute()


def _made(folder: Path, question: Question, change: Callable[[Image.Image], Image.Image]) -> Path:
    """The file in ``folder`` with the question's picture after ``change``; made if it is not there."""
    try:
        name = digest(question.id, question.image.read_bytes())[:16]
    except OSError as error:
        raise DataError(f"{question.image}: {error.strerror}") from None
    if not (file := folder / f"{name}.png").is_file():
        with publish.new_file(file) as new:
            change(opened(question)).save(new, "PNG")
    return file


def _record(question: Question, text: str, pictures: Sequence[Path]) -> dict[str, Any]:
    turns = [*question.turns[:-1], ("human", text), ("gpt", question.truth)]
    images = [str(picture) for picture in pictures]
    return {
        "id": question.id,
        "image": images[0] if len(images) == 1 else images,
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "kind": question.kind,
    }
