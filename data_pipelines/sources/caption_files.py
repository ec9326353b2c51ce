"""Caption files (parquet or JSONL), converted once to a table of columns that is memory-mapped, not loaded.

A few hundred million captions need disk space, not memory. The columns, sorted by ``hash``, the last of equal keys::

    hash       uint64 [n]  of the key; of a url or sha256, combined with its number in SALTS, where there is no key
    url_hash, sha256_hash  uint64 [n]  of the url and sha256 given beside the key, 0 = none
    start      int64  [n]  of the caption in ``texts``; length int32 [n], both in bytes
    chars      int32  [n]  characters of the caption
    text_hash  uint64 [n]  of the caption
    script     uint8  [n]  scripts.SCRIPTS
    texts      uint8  [m]  all captions as UTF-8, in the order of the files
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io.blobs import ScanView, open_file, scan_view
from data_pipelines.io.digests import digest, hash64
from data_pipelines.io.json_lines import lines
from data_pipelines.records.names import CAPTION_FIELDS
from data_pipelines.records.scripts import script_of
from data_pipelines.sources.indices.columns import ColumnFiles
from data_pipelines.sources.indices.index_builder import origin_of
from data_pipelines.sources.indices.shard_index import ORIGINS
from data_pipelines.sources.joining import last_of_equals

VERSION = "6"  # of the table
_ARRAYS = {"hash": "u8", "start": "i8", "length": "i4", "chars": "i4", "text_hash": "u8", "script": "u1"}
_ARRAYS |= dict.fromkeys(ORIGINS, "u8")
SALTS = {"url_hash": 0x9E3779B97F4A7C15, "sha256_hash": 0xC2B2AE3D27D4EB4F}  # so that no key is mistaken for a url
JOINED_BY = ("key", "url", "sha256")  # columns that identify a caption's sample; the first filled one is used
_MAX_LINE = 1 << 26  # bytes of a line, which may hold many captions; longer lines are not read
_BUFFERED = 1 << 16  # captions processed together while the table is written


def write_table(files: Sequence[str], folder: Path) -> None:
    """Writes the table to an empty folder; 45 bytes per caption are held in memory for sorting.

    The header is {"digest": of keys and captions, "broken": {FILE: [number of broken lines, the first]}}.
    Raises DataError, OSError.
    """
    table = ColumnFiles(folder)
    columns, broken = _collect(files, table)
    order = last_of_equals(columns["hash"])
    for name in _ARRAYS:
        columns[name] = columns[name][order]
        table.append(name, columns[name])
    origins = [columns[name].tobytes() for name in ORIGINS if columns[name].any()]
    content = digest(columns["hash"].tobytes(), columns["text_hash"].tobytes(), *origins)
    table.finish({"digest": content, "broken": broken})


def _collect(files: Sequence[str], table: ColumnFiles) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """(the columns in the order of the files, broken lines); the captions themselves go directly into the table."""
    broken: dict[str, list[int]] = {}
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in _ARRAYS.items()}
    position = 0
    table.append("texts", np.zeros(0, np.uint8))
    for entries in _batched(entry for file in files for entry in _entries(file, broken)):
        data = [entry.caption.encode() for entry in entries]
        table.append("texts", np.frombuffer(b"".join(data), np.uint8))
        lengths = np.array([len(d) for d in data], np.int64)
        new = {
            "hash": [entry.hash for entry in entries],
            "start": position + np.cumsum(lengths) - lengths,
            "length": lengths,
            "chars": [len(entry.caption) for entry in entries],
            "text_hash": [hash64(d) for d in data],
            "script": [script_of(entry.caption) for entry in entries],
            **{name: [entry.origin.get(name, 0) for entry in entries] for name in ORIGINS},
        }
        for name, values in new.items():
            parts[name].append(np.asarray(values, _ARRAYS[name]))
        position += int(lengths.sum())
    return {name: np.concatenate(parts[name]) for name in _ARRAYS}, broken


class _Entry(NamedTuple):
    """``hash``: of what identifies the caption; ``origin``: see ``origin_of``, of what a row says beside its key."""

    hash: int
    caption: str
    origin: Mapping[str, int] = {}


def _batched(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    while batch := list(itertools.islice(entries, _BUFFERED)):
        yield batch


def _entries(file: str, broken: dict[str, list[int]]) -> Iterator[_Entry]:
    rows = _parquet_rows(file) if file.endswith(".parquet") else _jsonl_rows(file, broken)
    for row in rows:
        caption, origin = row.get(_caption_field(row) or ""), origin_of(row)
        if not isinstance(caption, str) or not caption.strip():
            continue
        text = caption.encode("utf-8", "replace").decode()
        if row.get("key") is not None:
            yield _Entry(hash64(str(row["key"]).encode("utf-8", "surrogatepass")), text, origin)
        elif name := next(iter(origin), None):
            yield _Entry(origin[name] ^ SALTS[name], text)


def _caption_field(names: Iterable[str]) -> str | None:
    return next((name for name in CAPTION_FIELDS if name in names), None)


def _parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(file) as handle:
        try:
            parquet = pq.ParquetFile(handle)
            names = parquet.schema_arrow.names
            by, caption = [name for name in JOINED_BY if name in names], _caption_field(names)
            if not by or caption is None:
                missing = "key" if not by else "caption"
                hint = "caption files need 'key' (or 'url' or 'sha256') and 'caption'"
                raise DataError(f"{file}: no column {missing!r}; {hint}, its columns are {', '.join(names)}")
            for batch in parquet.iter_batches(columns=[*by, caption]):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not a readable parquet file ({error})") from None


def _jsonl_rows(file: str, broken: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    """The rows in the lines; the number of broken lines and the first of them are added to ``broken``.

    Raises DataError if all lines are broken.
    """
    bad, good, why = [], 0, ""
    with scan_view(file) as view:
        for number, offset, length in lines(view):
            try:
                value = _line(view, offset, length)
            except (ValueError, RecursionError) as error:
                why = why or f"{file}:{number}: not JSON with 'key' and 'caption' ({error})"
                bad = [bad[0] + 1, bad[1]] if bad else [1, number]
                continue
            good += 1
            is_row = _caption_field(value) and any(name in value for name in JOINED_BY)
            yield from [value] if is_row else [{"key": key, "caption": text} for key, text in value.items()]
    if bad and not good:
        raise DataError(why)
    if bad:
        broken[file] = bad


def _line(view: ScanView, offset: int, length: int) -> dict[str, Any]:
    """The object in a line. Raises ValueError."""
    if length > _MAX_LINE:
        raise ValueError(f"{length} bytes long")
    value = json.loads(view.read(offset, length))
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value
