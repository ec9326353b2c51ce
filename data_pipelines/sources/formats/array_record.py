"""ArrayRecord files as ``data_pipelines.build`` writes them: one sample a record, images as they were encoded.

A record is the magic b"MJR1", the header's length as uint32 (little endian), the header (a JSON object with "key",
"images" = byte lengths, and "caption", "conversations" or "text"; optionally scores, "sha256" and "tokens"), and the
images one behind the other. "tokens" holds the ids of the text part, for readers that want them; sizes are not stored,
since the index reads them from the images themselves. The library reads local files only, so a remote file is copied to
the cache folder when it is first read.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.io import storage
from data_pipelines.records import image_header as headers
from data_pipelines.records.text_record import Form, Record, from_object, parse_json
from data_pipelines.sources.indexed import IndexedSource, RawSample, Shard
from data_pipelines.sources.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

MAGIC = b"MJR1"
_FILES_KEPT = 32  # readers per thread
_BATCH, _BATCH_BYTES = 16, 1 << 26  # records read at a time while indexing: so many, fewer if they are large


def pack(sample: RawSample, extra: Mapping[str, Any] | None = None) -> bytes:
    """A record that holds ``sample`` and further JSON fields."""
    header: dict[str, Any] = {**(extra or {}), "key": sample.key, "images": [len(image) for image in sample.images]}
    if sample.conversations:
        header["conversations"] = [{"from": role, "value": text} for role, text in sample.conversations]
    elif sample.caption is not None:
        header["caption"] = sample.caption
    else:
        header["text"] = sample.text
    data = json.dumps(header, ensure_ascii=False).encode()
    return b"".join([MAGIC, len(data).to_bytes(4, "little"), data, *sample.images])


def unpack(record: bytes) -> tuple[dict[str, Any], Record, tuple[bytes, ...]]:
    """(header, text part, images) of a record. Raises BadSample: "bad_record", or what the text part deserves."""
    header, images = split(record)
    return header, _text(header), images


def split(record: bytes) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """(header, images) of a record. Raises BadSample "bad_record"."""
    end = 8 + int.from_bytes(record[4:8], "little")
    if record[:4] != MAGIC or end > len(record):
        raise BadSample("bad_record", detail=f"starts with {record[:8]!r}; expected {MAGIC!r}")
    header = parse_json(record[8:end])
    lengths = header.get("images", [])
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n >= 0 for n in lengths):
        raise BadSample("bad_record", detail="'images' must list byte lengths")
    if end + sum(lengths) != len(record):
        raise BadSample("bad_record", detail=f"{len(record)} bytes, the header counts {end + sum(lengths)}")
    images = []
    for length in lengths:
        images.append(record[end : end + length])
        end += length
    return header, tuple(images)


def _text(header: Mapping[str, Any]) -> Record:
    return from_object({name: header[name] for name in ("caption", "conversations", "text") if name in header})


class _Reader:
    """Random access to the records of one file."""

    def __init__(self, path: str):
        from array_record.python.array_record_module import ArrayRecordReader

        place = storage.local_copy(path)
        try:
            self._reader = ArrayRecordReader(place, "readahead_buffer_size:0")
            self.count = self._reader.num_records()
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample("corrupt_file", detail=str(error).splitlines()[0]) from None

    def read(self, rows: Sequence[int]) -> list[bytes]:
        try:
            return self._reader.read(list(rows))
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample("corrupt_chunk", detail=str(error).splitlines()[0]) from None


_local = threading.local()


def _reader(path: str) -> _Reader:
    """This thread's reader of a file; the ones used last are kept."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid, _local.readers = os.getpid(), functools.lru_cache(maxsize=_FILES_KEPT)(_Reader)
    return _local.readers(path)


def scan(path: str, meta: Mapping[str, Any], hash_images: bool = False) -> ShardIndex:
    """Indexes a file; a sample's offset is the number of its record.

    What cannot be read is named in ``problems``, its records count as "corrupt_chunk". Raises DataError if the file
    cannot be fetched.
    """
    builder = IndexBuilder()
    try:
        reader = _Reader(path)
    except BadSample as error:
        builder.problems.append(f"corrupt: not a whole ArrayRecord file ({error.detail})")
        return builder.build(meta)
    if not reader.count:
        builder.problems.append("empty or corrupt: no records found")
    start, count = 0, 1
    while start < reader.count:
        rows, largest = range(start, min(start + count, reader.count)), 1
        for row, record in zip(rows, _read_each(reader, rows)):
            _add(builder, row, record, hash_images)
            largest = max(largest, len(record or b""))
        start, count = rows.stop, max(1, min(_BATCH, 2 * count, _BATCH_BYTES // largest))
    return builder.build(meta)


def _read_each(reader: _Reader, rows: range) -> list[bytes | None]:
    """The records; None for those that cannot be read."""
    try:
        return list(reader.read(rows))
    except BadSample:
        if len(rows) == 1:
            return [None]
        return [record for row in rows for record in _read_each(reader, range(row, row + 1))]


def _add(builder: IndexBuilder, row: int, data: bytes | None, hash_images: bool) -> None:
    reason, record, header, images, parts = None, None, {}, (), []
    try:
        if data is None:
            raise BadSample("corrupt_chunk")
        header, images = split(data)
        parts = [ImagePart(row, len(image), headers.read_header(image).size) for image in images]
        record = _text(header)
    except BadSample as error:
        reason = error.reason
    noted = header.get("sha256")
    image_hash = hash64(noted.encode()) if images and isinstance(noted, str) else 0
    if images and hash_images and not image_hash:
        image_hash = hash64(b"".join(images))
    builder.add(
        str(header.get("key") or row),
        images=parts,
        text=(row, 0, Form.JSON),
        record=record,
        scores=scores_of(header),
        image_hash=image_hash,
        reason=reason,
    )


class Source(IndexedSource):
    """Records of ArrayRecord files. Keys are FILE/KEY."""

    def _split(self, shard: Shard, index: int) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        """The record read last is kept, since text and images are asked for one after the other."""
        row = int(self._table.arrays["text_offset"][index])
        if getattr(_local, "last", (None,))[0] != (os.getpid(), shard.path, row):
            (data,) = _reader(shard.path).read([row])
            _local.last = ((os.getpid(), shard.path, row), split(data))
        return _local.last[1]

    def _record(self, shard: Shard, index: int) -> Record:
        return _text(self._split(shard, index)[0])

    def _images(self, shard: Shard, index: int, record: Record) -> tuple[bytes, ...]:
        return self._split(shard, index)[1]
