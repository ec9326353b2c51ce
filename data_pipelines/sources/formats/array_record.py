"""ArrayRecord files of samples, see ``containers.array_record``."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.io.digests import hash64
from data_pipelines.records import image_header
from data_pipelines.records.raw_sample import Form, RawSample
from data_pipelines.records.video.reference import with_frames
from data_pipelines.sources.containers.array_record import Reader, forget_readers, frames_of, reader, split, text_of
from data_pipelines.sources.formats.format import FileFormat
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import Draft, ImagePart, IndexBuilder, TextPart, origin_of, scores_of
from data_pipelines.sources.indices.shard import FrameOptions, Shard

_BATCH, _BATCH_BYTES = 16, 1 << 26  # records read at a time while indexing; fewer if they are large
_local = threading.local()


@dataclasses.dataclass(frozen=True)
class ArrayRecordOptions(FrameOptions):
    """``hash_images``: whether images without a stored hash are hashed, for the filter unique_images."""

    hash_images: bool = False


class ArrayRecordFormat(FileFormat):
    """Records of ArrayRecord files. Keys are FILE/KEY."""

    kind, suffixes, options = "array_record", (".array_record", ".arrayrecord"), ArrayRecordOptions

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """A sample's offset is the number of its record; unreadable records count as "corrupt_chunk".

        Raises StorageError if the file cannot be fetched or opened.
        """
        try:
            records = Reader(shard.path)
        except BadSample as error:
            builder.problems.append(f"corrupt: not a valid ArrayRecord file ({error.detail})")
            return
        if not records.count:
            builder.problems.append("empty or corrupt: no records found")
        start, count = 0, 1
        while start < records.count:
            rows, largest = range(start, min(start + count, records.count)), 1
            for row, record in zip(rows, _read_each(records, rows)):
                builder.add(_draft(row, record, shard.options.hash_images))
                largest = max(largest, len(record or b""))
            start, count = rows.stop, max(1, min(_BATCH, 2 * count, _BATCH_BYTES // largest))

    def forget(self) -> None:
        _local.last = (None,)
        forget_readers()

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """The last record read is kept, since text and images are requested one after another."""
        last = (os.getpid(), shard.path, entry.row)
        if getattr(_local, "last", (None,))[0] != last:
            (data,) = reader(shard.path).read([entry.row])
            _local.last = (last, split(data))
        header, data = _local.last[1]
        return dataclasses.replace(text_of(header) if text else RawSample(), images=data if images else ())


def _read_each(records: Reader, rows: range) -> list[bytes | None]:
    """The records; None for those that cannot be read."""
    try:
        return list(records.read(rows))
    except BadSample:
        if len(rows) == 1:
            return [None]
        return [record for row in rows for record in _read_each(records, range(row, row + 1))]


def _draft(row: int, data: bytes | None, hash_images: bool) -> Draft:
    draft = Draft(str(row), text=TextPart(row, 0, Form.JSON))
    with draft.judged():
        if data is None:
            raise BadSample("corrupt_chunk")
        header, images = split(data)
        draft.key = str(header.get("key") or row)
        draft.scores, draft.origin = scores_of(header), origin_of(header)
        draft.image_hash = _image_hash(images, header.get("sha256"), hash_images)
        frames = frames_of(header)
        draft.images = [
            ImagePart(row, len(image), image_header.read_header(image).size, frame=frame)
            for image, frame in zip(images, frames)
        ]
        draft.record = with_frames(text_of(header), frames)
    return draft


def _image_hash(images: tuple[bytes, ...], sha256: Any, hash_images: bool) -> int:
    if images and isinstance(sha256, str):
        return hash64(sha256.encode())
    return hash64(b"".join(images)) if images and hash_images else 0
