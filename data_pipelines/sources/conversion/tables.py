"""Tables as lines of JSON or as parquet: CSV and TSV (VLMEvalKit's base64 images among them), Arrow and Feather."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any, BinaryIO

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import blobs
from data_pipelines.sources.conversion import json_shapes

_MOST_CELL = 1 << 28  # bytes
_INDEX = 64  # characters: an "image" no longer than this is the index of another row that holds the image
_ROW_GROUP = 256


class _Raw(io.RawIOBase):
    """A PatientFile as Python's text layer needs it."""

    def __init__(self, file: blobs.PatientFile):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def csv_lines(path: str, out: BinaryIO) -> None:
    """Writes the rows of a CSV or TSV file as lines of JSON, empty cells left out. Raises DataError."""
    csv.field_size_limit(_MOST_CELL)
    with blobs.open_file(path) as file:
        text = io.TextIOWrapper(io.BufferedReader(_Raw(file), 1 << 20), "utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter="\t" if path.lower().endswith(".tsv") else ",")
        held: dict[str, str] = {}
        try:
            for row in rows:
                record = {name: cell for name, cell in row.items() if name and cell not in (None, "")}
                image = record.get("image", "")
                if len(image) > _INDEX and "index" in record:
                    held[record["index"]] = image
                elif image in held:
                    record["image"] = held[image]
                out.write(json_shapes.line_of({name: _cell(cell) for name, cell in record.items()}))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{rows.line_num + 1}: not a whole CSV file ({error})") from None


def _cell(cell: str) -> Any:
    """A list or object that was written as text, otherwise the text."""
    if re.match(r"\[\s*[\[{\"]|\{\s*\"", cell):
        try:
            return json.loads(cell)
        except ValueError:
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
            raise DataError(f"{path}: not a whole Arrow file ({' '.join(str(error).split())[:200]})") from None
