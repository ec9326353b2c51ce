"""Rows of parquet files in bounded memory: in order for indexing, one by one for training.

Random access to a row requires reading its row group, so the most recently used groups are kept.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import BadSample
from data_pipelines.io.blobs import open_file

_FILES_KEPT = 64  # open readers per thread
_GROUP_BYTES = 1 << 28  # bytes of row groups kept per thread; a group larger than half of it is streamed
_BATCH, _BATCH_BYTES = 64, 1 << 26  # rows read at a time; fewer if they are large
_OPEN = {"buffer_size": 1 << 20, "pre_buffer": False}  # otherwise a whole row group would be fetched at once
_BOMB_BYTES, _BOMB_RATIO = 1 << 29, 50  # images do not compress: a group above both is a decompression bomb


def open_parquet(file: Any, problems: list[str]) -> pq.ParquetFile | None:
    """A parquet file to be read in order; None, and one more problem, if it is not intact."""
    try:
        parquet = pq.ParquetFile(file, **_OPEN)
        for group in range(parquet.num_row_groups):
            parquet.metadata.row_group(group)
    except (pa.ArrowException, OSError) as error:  # a content error: read errors are StorageError
        problems.append(f"corrupt: not a valid parquet file ({_first_line(error)})")
        return None
    return parquet


def rows_in_order(
    parquet: pq.ParquetFile, columns: Sequence[str], problems: list[str]
) -> Iterator[dict[str, Any] | None]:
    """All rows, None for those that cannot be read; each row group with such rows adds one problem."""
    for group in range(parquet.num_row_groups):
        lost = parquet.metadata.row_group(group).num_rows
        try:
            for batch in _batches(parquet, group, columns):
                for row in _rows(batch):
                    yield row
                    lost -= 1
        except (pa.ArrowException, OSError) as error:
            problems.append(f"corrupt: row group {group} ({_first_line(error)})")
        yield from [None] * lost


def schema(path: str) -> pa.Schema:
    """The columns of a file. Raises BadSample or StorageError if it cannot be read."""
    with _unreadable():
        return _reader(path).schema


def read_row(path: str, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """Some columns of a row. Raises BadSample or StorageError if it cannot be read."""
    with _unreadable():
        return _reader(path).row(row, columns)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, StopIteration, ValueError, IndexError) as error:
        raise BadSample("unreadable", detail=_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _batches(parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """A row group piece by piece. Raises ArrowException or OSError."""
    about = parquet.metadata.row_group(group)
    packed = sum(about.column(c).total_compressed_size for c in range(about.num_columns))
    if about.total_byte_size > max(_BOMB_BYTES, _BOMB_RATIO * packed):
        raise pa.ArrowInvalid(f"a decompression bomb: {about.total_byte_size} bytes from {packed}")
    rows = max(1, min(_BATCH, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
    return parquet.iter_batches(rows, row_groups=[group], columns=list(columns))


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as dicts; a string that is not UTF-8 is given as bytes."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            columns[name] = [_text(value) for value in column.cast(pa.binary()).to_pylist()]
    for i in range(batch.num_rows):
        yield {name: values[i] for name, values in columns.items()}


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


class _Stream:
    """A big row group, read from its beginning up to the requested rows: cheap if they are requested in order."""

    def __init__(self, parquet: pq.ParquetFile, group: int, columns: Sequence[str]):
        self.group = group
        self._batches = _batches(parquet, group, columns)
        self.start, self._batch = 0, next(self._batches)

    def row(self, row: int) -> pa.RecordBatch:
        """A row not before ``start``."""
        while row >= self.start + self._batch.num_rows:
            self.start += self._batch.num_rows
            self._batch = next(self._batches)
        return self._batch.slice(row - self.start, 1)


class _Reader:
    """Rows of one file. Small row groups are kept whole, big ones streamed. Not for several threads at once."""

    def __init__(self, path: str):
        self._path = path
        self._parquet = pq.ParquetFile(open_file(path), **_OPEN)
        groups = [self._parquet.metadata.row_group(g) for g in range(self._parquet.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._big = {g for g, group in enumerate(groups) if group.total_byte_size > _GROUP_BYTES // 2}
        self.schema = self._parquet.schema_arrow
        self._streams: dict[tuple[str, ...], _Stream] = {}

    def row(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, row, side="right"))
        row -= int(self._ends[group - 1]) if group else 0
        if group not in self._big and (whole := self._whole(group, columns)) is not None:
            return next(_rows(whole.slice(row, 1)))
        stream = self._streams.get(columns)
        if stream is None or stream.group != group or row < stream.start:
            stream = self._streams[columns] = _Stream(self._parquet, group, columns)
        return next(_rows(stream.row(row)))

    def _whole(self, group: int, columns: tuple[str, ...]) -> pa.RecordBatch | None:
        """A small row group, from what the thread keeps of all its files; None if it turns out to be big."""
        kept: dict[Any, pa.RecordBatch] = _local.groups
        name = (self._path, group, columns)
        if (found := kept.pop(name, None)) is None:
            if (found := self._small(group, columns)) is None:
                self._big.add(group)
                return None
            while kept and sum(batch.nbytes for batch in kept.values()) + found.nbytes > _GROUP_BYTES:
                del kept[next(iter(kept))]  # the least recently used one
        kept[name] = found  # last: used now
        return found

    def _small(self, group: int, columns: tuple[str, ...]) -> pa.RecordBatch | None:
        """A row group; None if it is too big for memory. That is not known in advance for dictionary-encoded values,
        which are counted once however often they occur."""
        parts, size = [], 0
        for batch in _batches(self._parquet, group, columns):
            parts.append(batch)
            size += batch.nbytes
            if size > _GROUP_BYTES // 2:
                return None
        return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


_local = threading.local()


def forget_readers() -> None:
    """Closes this thread's readers."""
    _local.pid = None


def _reader(path: str) -> _Reader:
    """This thread's reader of a file; the most recently used ones are kept."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid, _local.groups = os.getpid(), {}
        _local.readers = functools.lru_cache(maxsize=_FILES_KEPT)(_Reader)
    return _local.readers(path)
