"""Rows of benchmark files: VLMEvalKit's TSV, JSONL, JSON and Parquet.

TSV      with a header; an empty cell means no value
JSONL    one object per line
JSON     a list of objects, {"data" | "questions" | "images": [...]}, or {ID: object}
parquet  as stored by Hugging Face
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import DataError

_LISTS = ("data", "questions", "images")  # keys of a JSON object; the first that exists is used
ID_OF_KEY = "__key__"  # the value that holds an object's key


@dataclasses.dataclass(frozen=True)
class Row:
    """``place``: FILE:LINE, for messages. ``values``: without empty ones."""

    file: Path
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def read_rows(file: Path) -> Iterator[Row]:
    """Raises DataError that names the file and the line."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: unknown kind of file, use one of {', '.join(_READERS)}")
    try:
        for number, values in reader(file):
            yield Row(file, number, {key: value for key, value in values.items() if not _is_empty(value)})
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}): convert it") from None


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _tsv(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # a cell holds a whole picture
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t")
        header = next(reader, [])
        if len(header) < 2:
            raise DataError(f"{file}:1: no header of columns separated by tabs")
        try:
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(
                        f"{file}:{reader.line_num}: {len(cells)} cells, but the header has {len(header)}: "
                        "is the file complete?"
                    )
                yield reader.line_num, dict(zip(header, cells))
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: {error}") from None


def _jsonl(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(file, number, _parsed(f"{file}:{number}", line))


def _json(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows are numbered from 1."""
    value = _parsed(str(file), file.read_bytes())
    if isinstance(value, dict):
        found = next((value[key] for key in _LISTS if isinstance(value.get(key), list)), None)
        if found is None:
            value = [{ID_OF_KEY: key, **each} if isinstance(each, dict) else each for key, each in value.items()]
        else:
            value = found
    if not isinstance(value, list):
        raise DataError(f"{file}: neither a list nor an object of examples")
    for number, each in enumerate(value, 1):
        yield number, _object(file, number, each)


def _parquet(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(64):
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a complete Parquet file: {str(error).splitlines()[0]}") from None


def _parsed(place: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None


def _object(file: Path, number: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{file}:{number}: {type(value).__name__} instead of an object")
    return value


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
