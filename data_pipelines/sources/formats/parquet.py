"""Parquet with images in a column: img2dataset's ``parquet`` output, tables of {bytes, path} structs or lists of them.

Random access to a row costs the reading of its row group, so the groups used last are kept; parquet is best read in
long runs (shuffle "local"), or rewritten once by ``data_pipelines.build``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records import image_header as headers
from data_pipelines.records.text_record import Form, Record, from_object
from data_pipelines.sources.formats.tar import stats_problems
from data_pipelines.sources.indexed import IndexedSource, Shard
from data_pipelines.sources.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "image_bytes")
_TEXT_COLUMNS = ("caption", "conversations", "messages", "text")
_FILES_KEPT = 64  # open readers per thread
_GROUP_BYTES = 1 << 28  # row groups kept in memory per thread; one beyond half of it is streamed instead
_BATCH, _BATCH_BYTES = 64, 1 << 26  # rows read at a time: so many, fewer if they are large
_OPEN = {"buffer_size": 1 << 20, "pre_buffer": False}  # otherwise a whole row group is fetched at once
_BOMB_BYTES, _BOMB_RATIO = 1 << 29, 50  # images do not compress: a group beyond both is a decompression bomb
_FAILURES = ("failed_to_download", "failed_to_resize")  # values of img2dataset's column "status"


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A seekable file object. Raises DataError if it cannot be opened."""
    try:
        if storage.is_remote(path):
            fs, inner = storage.filesystem(path)
            file = fs.open(inner, "rb")
        else:
            file = open(storage.local_path(path), "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    with file:
        yield file


def _columns(names: Sequence[str], image_key: str | None, caption_key: str | None) -> tuple[str | None, list[str]]:
    """(image column, text columns). Raises DataError if there is nothing to read or a named column is missing."""
    for key in (image_key, caption_key):
        if key and key not in names:
            raise DataError(f"no column {key!r}; columns: {', '.join(names)}")
    image = image_key or next((name for name in IMAGE_COLUMNS if name in names), None)
    texts = [caption_key] if caption_key else [name for name in _TEXT_COLUMNS if name in names]
    if image is None and not set(texts) & {"text", "conversations", "messages"}:
        raise DataError(f"no column of images; set image_key to one of: {', '.join(names)}")
    return image, texts


def scan(
    path: str,
    meta: Mapping[str, Any],
    image_key: str | None = None,
    caption_key: str | None = None,
    hash_images: bool = False,
) -> ShardIndex:
    """Indexes a parquet file; a sample's offset is its row, its key the column "key" or the row's number.

    What cannot be read is named in ``problems``; the rows of a broken group count as "corrupt_row_group".
    Raises DataError if the file cannot be opened or has no fitting column.
    """
    builder = IndexBuilder()
    with open_parquet(path) as file:
        try:
            parquet = pq.ParquetFile(file, **_OPEN)
            groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            builder.problems.append(f"corrupt: not a whole parquet file ({_first_line(error)})")
            return builder.build(meta)
        names = parquet.schema_arrow.names
        try:
            image, texts = _columns(names, image_key, caption_key)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        wanted = {"key", "status", "sha256", image, *texts, *(n for n in names if scores_of({n: 0.0}))}
        row = pictured = 0
        for group, count in enumerate(groups):
            done = row
            try:
                for batch in _batches(parquet, group, [n for n in names if n in wanted]):
                    for value in _rows(batch):
                        pictured += _add(builder, done, value, image, caption_key, hash_images)
                        done += 1
            except (pa.ArrowException, OSError) as error:
                builder.problems.append(f"corrupt: row group {group} ({_first_line(error)})")
            for lost in range(done, row + count):
                builder.add(f"row{lost}", reason="corrupt_row_group")
            row += count
    builder.problems.extend(stats_problems(path, pictured))
    return builder.build(meta)


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


def _record(value: Mapping[str, Any], caption_key: str | None) -> Record:
    """The text of a row. Image columns are looked at elsewhere."""
    name = caption_key or "caption"
    for key in (name, "text"):
        if isinstance(value.get(key), bytes):
            raise BadSample("caption_not_utf8", detail=repr(value[key][:40]))
    talks = {key: value[key] for key in ("conversations", "messages") if value.get(key) is not None}
    if talks and not caption_key:
        return from_object(talks)
    if name in value:
        return from_object({"caption": value[name]})
    return from_object({"text": value.get("text")})


def image_bytes(value: Any) -> tuple[bytes, ...]:
    """Encoded images in a cell: bytes, {"bytes": ...}, or a list of these. Raises BadSample."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(image for item in value for image in image_bytes(item))
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BadSample("no_image", detail=f"the cell holds {type(value).__name__} instead of bytes")
    return (value,)


def _add(
    builder: IndexBuilder, row: int, value: Mapping[str, Any], image: str | None, caption_key: str | None, hashes: bool
) -> bool:
    """Adds a row to the index; returns whether its image cell holds anything."""
    reason, record, data, parts, image_hash = None, None, (), [], 0
    try:
        record = _record(value, caption_key)
    except BadSample as error:
        reason = error.reason
    try:
        data = image_bytes(value.get(image)) if image else ()
        if image and not data and (record is None or record.caption is not None):
            raise BadSample(value.get("status") if value.get("status") in _FAILURES else "no_image")
        parts = [ImagePart(row, len(d), headers.read_header(d).size) for d in data]
        if data and isinstance(value.get("sha256"), str):
            image_hash = hash64(value["sha256"].encode())
        elif data and hashes:
            image_hash = hash64(b"".join(data))
    except BadSample as error:
        reason, parts = error.reason, []
    key = value.get("key")
    builder.add(
        str(key) if key is not None and not isinstance(key, bytes) else f"row{row}",
        images=parts,
        text=(row, 0, Form.JSON),
        record=record,
        scores=scores_of({k: v for k, v in value.items() if v is not None}),
        image_hash=image_hash,
        reason=reason,
    )
    return bool(data)


class _Stream:
    """A big row group, read from its beginning as far as rows are asked for: cheap if that is in order."""

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
        self._context = open_parquet(path)
        self._parquet = pq.ParquetFile(self._context.__enter__(), **_OPEN)
        groups = [self._parquet.metadata.row_group(g) for g in range(self._parquet.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._big = {g for g, group in enumerate(groups) if group.total_byte_size > _GROUP_BYTES // 2}
        self.names = self._parquet.schema_arrow.names
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
                del kept[next(iter(kept))]  # the one not used for longest
        kept[name] = found  # last: used now
        return found

    def _small(self, group: int, columns: tuple[str, ...]) -> pa.RecordBatch | None:
        """A row group; None if it is too big for memory, which is not known before where values stand in a dictionary
        and are counted once however often they occur."""
        parts, size = [], 0
        for batch in _batches(self._parquet, group, columns):
            parts.append(batch)
            size += batch.nbytes
            if size > _GROUP_BYTES // 2:
                return None
        return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


_local = threading.local()


def _reader(path: str) -> _Reader:
    """This thread's reader of a file; the ones used last are kept."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid, _local.groups = os.getpid(), {}
        _local.readers = functools.lru_cache(maxsize=_FILES_KEPT)(_Reader)
    return _local.readers(path)


class Source(IndexedSource):
    """Rows of parquet files. Keys are FILE/KEY."""

    def _fetch(self, shard: Shard, index: int, images: bool, text: bool) -> tuple[Record, tuple[bytes, ...]]:
        """All that is asked for in one read."""
        joined = self._caption_row(index)
        images = images and bool(self._table.arrays["image_count"][index])
        value, image = self._row(shard, index, images, text and joined < 0)
        if not text:
            record = Record()
        elif joined < 0:
            record = _record(value, shard.options.get("caption_key"))
        else:
            record = self._captioned(shard, index, self._captions[joined])
        return record, image_bytes(value[image]) if images else ()

    def _row(self, shard: Shard, index: int, images: bool, text: bool) -> tuple[dict[str, Any], str | None]:
        """(the row's image and text columns as far as asked for, name of the image column)."""
        try:
            reader = _reader(shard.path)
            image, texts = _columns(reader.names, shard.options.get("image_key"), shard.options.get("caption_key"))
            columns = (*(texts if text else ()), *([image] if images and image not in texts else ()))
            if not columns:
                return {}, image
            return reader.row(int(self._table.arrays["text_offset"][index]), columns), image
        except (pa.ArrowException, StopIteration, ValueError, IndexError) as error:
            raise BadSample("unreadable", detail=_first_line(error)) from None
