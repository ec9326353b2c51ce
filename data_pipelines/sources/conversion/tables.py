"""Tables as lines of JSON or as parquet: CSV and TSV (including VLMEvalKit's base64 images), Arrow and Feather."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import blobs
from data_pipelines.records import names
from data_pipelines.sources.conversion import json_shapes

_MOST_CELL = 1 << 28  # bytes
_INDEX = 64  # characters: an "image" no longer than this is the index of another row that holds the image
_ROW_GROUP = 256
_HEAD = 1 << 16  # bytes within which the header must be
_DELIMITERS = (",", "\t", ";", "|")


class _Raw(io.RawIOBase):
    """A PatientFile in the form that Python's text layer needs."""

    def __init__(self, file: blobs.PatientFile):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Header(NamedTuple):
    """The columns of a table, and how its lines are read; ``before``: preceding blank lines and Excel's "sep=;"."""

    columns: list[str]
    delimiter: str
    encoding: str
    before: int


def csv_lines(path: str, out: BinaryIO) -> None:
    """Writes the rows of a CSV or TSV file as lines of JSON, empty cells left out.

    The delimiter is a comma, tab, semicolon or bar, whichever splits the header most; spaces around the header's names
    are removed. Raises a DataError that names the file, the line and the problem.
    """
    csv.field_size_limit(_MOST_CELL)
    with blobs.open_file(path) as file:
        header = _header(path, file.read(_HEAD))
        file.seek(0)
        text = io.TextIOWrapper(io.BufferedReader(_Raw(file), 1 << 20), header.encoding, newline="")
        for _ in range(header.before):
            text.readline()
        rows = csv.DictReader(text, header.columns or None, delimiter=header.delimiter, skipinitialspace=True)
        held: dict[str, str] = {}
        try:
            next(rows, None)  # the header itself
            for row in rows:
                record = {name: cell for name, cell in row.items() if name and cell not in (None, "")}
                image = record.get("image", "")
                if len(image) > _INDEX and "index" in record:
                    held[record["index"]] = image
                elif image in held:
                    record["image"] = held[image]
                out.write(json_shapes.line_of({name: _cell(cell) for name, cell in record.items()}))
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num + header.before}: not a valid CSV file ({error})") from None
        except UnicodeDecodeError as error:
            encoding, what = header.encoding.removesuffix("-sig").upper(), error.object[error.start : error.end]
            where = f"{path}:{_first_not(path, header.encoding)}"
            raise DataError(f"{where}: not {encoding} ({error.reason}: {what!r}); write the file as UTF-8") from None


def _header(path: str, head: bytes) -> _Header:
    """The header of a file. Raises DataError if its first line names an image, not columns."""
    encoding = json.detect_encoding(head)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    lines = head.decode(encoding, "replace").splitlines() or [""]
    before = next((n for n, line in enumerate(lines) if not re.fullmatch(r"(?:sep=.)?\s*", line)), 0)
    order = sorted(_DELIMITERS, key=lambda each: each != ("\t" if path.lower().endswith(".tsv") else ","))
    found = [next(csv.reader([lines[before]], delimiter=each, skipinitialspace=True), []) for each in order]
    columns = max(found, key=len)
    columns, delimiter = [name.strip() for name in columns], order[found.index(columns)]
    if any(names.IMAGE_NAME.search(name) for name in columns):
        example = delimiter.join(["image", "caption"])
        raise DataError(f"{path}:{before + 1}: names an image, not the columns: put a line such as {example!r} first")
    return _Header(columns, delimiter, encoding, before)


def holds_records(path: str, head: bytes) -> bool:
    """Whether the columns of a table have names used in records; ``head``: the first bytes."""
    try:
        columns = _header(path, head[:_HEAD]).columns
    except DataError:
        return True  # reading it will say what is wrong
    return not json_shapes.KNOWN.isdisjoint(map(str.lower, columns))


def _first_not(path: str, encoding: str) -> int:
    """The number of the first line that cannot be decoded."""
    if encoding != "utf-8-sig":
        return 1
    lines = blobs.read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return len(lines)


def _cell(cell: str) -> Any:
    """The list or object if the cell is one written as text, otherwise the text."""
    if re.match(r"\[\s*[\[{\"]|\{\s*\"", cell):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def arrow_to_parquet(path: str, out: BinaryIO) -> None:
    """Writes the batches of an Arrow file, in the file or the stream format, as parquet. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with blobs.open_file(path) as file:
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            source = pa.PythonFile(file, "r")
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
            with pq.ParquetWriter(out, reader.schema) as writer:
                for batch in batches:
                    writer.write_batch(batch, row_group_size=_ROW_GROUP)
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a valid Arrow file ({' '.join(str(error).split())[:200]})") from None
