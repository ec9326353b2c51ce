"""What the cells of a row mean: ids, questions, right answers, options and pictures, under the names in common use."""

from __future__ import annotations

import ast
import base64
import binascii
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io.digests import hash64
from data_pipelines.records.pictures import looks_like_an_image
from mono_jax.evaluation.benchmarks.reading.example import Picture, Spool
from mono_jax.evaluation.benchmarks.reading.rows import ID_OF_KEY, Row

ID = ("question_id", "questionId", "index", "id", "pid", "image_id", ID_OF_KEY)
INDEX = ("index", "id")  # of a question in one order of its options
QUESTION = ("question", "query", "text", "problem")
ANSWERS = ("answers", "answer", "label", "gt_answer", "multiple_choice_answer")
OPTIONS = ("options", "choices")
CATEGORY = ("l2-category", "category", "subcategory", "task", "question_type_id", "subfield")
_IMAGES = ("image", "images", "image_path", *(f"image_{number}" for number in range(1, 8)))
_SHORT = 64  # characters; a cell of at most this length is the index of a row with the same picture
_FOLDERS = ("", "images", "image")  # where pictures may be, below the folders that are searched


def cell(row: Row, names: Sequence[str]) -> Any:
    """The first of ``names`` that the row has; None if it has none."""
    return next((row.values[name] for name in names if name in row.values), None)


def needed(row: Row, names: Sequence[str], what: str) -> Any:
    """Raises DataError that names the row and the columns."""
    if (value := cell(row, names)) is None:
        there = ", ".join(sorted(map(str, row.values))) or "nothing"
        raise DataError(f"{row.place}: no {what}: one of {', '.join(names)} is needed, found {there}")
    return value


def question(row: Row) -> str:
    text = needed(row, QUESTION, "question")
    if not isinstance(text, str):
        raise DataError(f"{row.place}: the question is a {type(text).__name__}: it must be text")
    return text


def answers(row: Row, names: Sequence[str] = ANSWERS) -> tuple[str, ...]:
    """All right answers, from text, a list of texts or of {"answer": ...}, or such a list as text; () if none is given.

    Text like "[12]" is one answer, since no member of the list is text.
    """
    value = cell(row, names)
    if isinstance(value, str) and value.startswith("["):
        listed = _literal(value)
        value = listed if all(isinstance(each, (str, Mapping)) for each in listed) else value
    found = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_text(each.get("answer") if isinstance(each, Mapping) else each, row) for each in found)


def _text(value: Any, row: Row) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise DataError(f"{row.place}: a right answer is {str(value)[:40]!r}: it must be text or a number")


def options(row: Row) -> dict[str, str]:
    """{letter: text} of columns A, B, ... or of a list of options; {} if there are none."""
    if found := {letter: str(row.values[letter]) for letter in string.ascii_uppercase if letter in row.values}:
        return found
    value = cell(row, OPTIONS)
    value = _literal(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(key): str(text) for key, text in value.items()}
    return dict(zip(string.ascii_uppercase, map(str, value))) if isinstance(value, list) else {}


def letter(row: Row, of: Mapping[str, str]) -> tuple[str, ...]:
    """The letter of the right option, from a letter, an index from 0, or an option's text; () if none is given."""
    value = cell(row, ANSWERS)
    if value is None:
        return ()
    text = str(value).strip()
    letters = list(of)
    if text in of:
        return (text,)
    named = [key for key, option in of.items() if option.strip() == text]
    if isinstance(value, str) and named:  # a value stored as a number is an index, even if the options are numbers
        return (named[0],)
    if text.isdecimal() and int(text) < len(of):
        return (letters[int(text)],)
    raise DataError(f"{row.place}: the answer is {text[:40]!r}: it must be one of {', '.join(letters)}, or an option")


def _literal(text: str) -> Any:
    """A Python or JSON list written as text; otherwise the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


class Pictures:
    """The pictures of rows: files below some folders, base64, or bytes; a row may refer to another row's picture."""

    def __init__(self, folders: Sequence[Path]):
        self._folders, self._spool = folders, Spool()
        self._of_index: dict[str, tuple[Picture, ...]] = {}

    def of(self, row: Row) -> tuple[Picture, ...]:
        """Raises DataError that names the row, and where a file was searched for."""
        index, value = str(row.values.get("index", "")), row.values.get("image")
        found = self._in_cell(row, str(value).strip()) if isinstance(value, (str, int)) else None
        if found is None:
            found = tuple(self._found(row))
        if index:
            self._of_index[index] = found
        return found

    def _in_cell(self, row: Row, value: str) -> tuple[Picture, ...] | None:
        """VLMEvalKit's cells: the index of an earlier row, base64, or a list of that as text; None = a path or URL."""
        if value in self._of_index:
            return self._of_index[value]
        is_table = row.file.suffix.lower() == ".tsv"  # which never has paths
        if is_table and len(value) <= _SHORT:
            raise DataError(f"{row.place}: image names row {value!r}, which does not precede it: is the file complete?")
        return self._encoded(row, value) if is_table or _is_encoded(value) else None

    def _encoded(self, row: Row, value: str) -> tuple[Picture, ...]:
        cells = _literal(value) if value.startswith("[") else [value]
        path = _picture_name(row)
        name = path or f"{row.file.name}:{row.number}"
        return tuple(
            self._kept(f"{name}#{number}" if number else name, _decoded(row, text), path)
            for number, text in enumerate(cells)
        )

    def _kept(self, name: str, data: bytes, path: str = "") -> Picture:
        """``path``: where a benchmark says that two of its pictures differ although they look the same."""
        mark = f"{hash64(data):x}"
        return Picture(name, mark, f"{path}#{mark}", spool=self._spool, place=self._spool.add(data))

    def _found(self, row: Row) -> Iterator[Picture]:
        for column in _IMAGES:
            value = row.values.get(column)
            for number, each in enumerate(value if isinstance(value, list) else [value]):
                if each is None:
                    continue
                if isinstance(each, Mapping):  # as Hugging Face's Image feature is stored
                    data, path = each.get("bytes"), each.get("path")
                    if data is not None:
                        name = path or f"{row.file.name}:{row.number}/{column}{number or ''}"
                        yield self._kept(name, data, _picture_name(row))
                        continue
                    each = path
                if isinstance(each, bytes):
                    yield self._kept(f"{row.file.name}:{row.number}/{column}{number or ''}", each)
                elif isinstance(each, str) and (each.startswith("data:") or _is_encoded(each)):
                    text = each.partition(",")[2] if each.startswith("data:") else each
                    yield self._kept(f"{row.file.name}:{row.number}/{column}{number or ''}", _decoded(row, text))
                elif isinstance(each, str):
                    path = self._path(row, each)
                    yield Picture(each, str(path.stat().st_size), each, path)
                else:
                    raise DataError(f"{row.place}: {column} is {str(each)[:40]!r}: it must be a path, base64 or bytes")
            if value is not None and not column.startswith("image_"):
                return

    def _path(self, row: Row, name: str) -> Path:
        names = [name, name.split("/", 1)[-1]] if name.startswith("data/") else [name]  # InternVL's files say data/...
        tried = [root / below / each for root in self._folders for below in _FOLDERS for each in names]
        for path in tried:
            if os.path.isfile(path):  # unlike Path's, False for a name that no file can have
                return path
        raise DataError(f"{row.place}: {name[:200]}: no such picture below {', '.join(map(str, self._folders))}")


def _picture_name(row: Row) -> str:
    """What the benchmark calls the row's picture, "" if nothing. lmms-lab's MME has it as the id of both questions."""
    name = str(row.values.get("question_id", ""))
    return str(row.values.get("image_path", name if is_picture(name) else ""))


def is_picture(name: str) -> bool:
    """Whether it is the name of a picture's file, as benchmarks write it."""
    return Path(name).suffix.lower() in (".jpg", ".jpeg", ".png")


def _is_encoded(text: str) -> bool:
    """Whether a cell, which may be a list as text, begins like a picture in base64; a long path does not."""
    if len(text) <= _SHORT:
        return False
    try:
        return looks_like_an_image(base64.b64decode(text.lstrip("[\"' ")[:_SHORT], validate=True))
    except (binascii.Error, ValueError):
        return False


def _decoded(row: Row, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{row.place}: image is not base64: {error}") from None
