"""ArrayRecord files as ``data_pipelines.build`` writes them: one sample a record, images as they were encoded.

A record consists of the magic b"MJR1", the header's length as uint32 (little endian), the header, and the images one
after another. The header is a JSON object with "key", "images" = byte lengths, and "caption", "conversations" or
"text"; optionally scores, "sha256" and "tokens". If there are video frames, it has "frames" = the number of each image
within a video, from 1, 0 = an image; a video has one mark in the text. "tokens" holds the ids of the text part, for
readers that want them. Sizes are not stored, since the index reads them from the images themselves. The library reads
only local files, so a remote file is copied to the cache folder when it is first read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.io.copies import local_copy
from data_pipelines.io.storage import storage
from data_pipelines.records.layouts import Reading, from_record
from data_pipelines.records.raw_sample import RawSample, checked_text, parse_json
from data_pipelines.records.video.reference import with_frames, without_frames

MAGIC = b"MJR1"
_FILES_KEPT = 32  # readers per thread


def pack(sample: RawSample, extra: Mapping[str, Any] | None = None) -> bytes:
    """A record that holds ``sample`` and further JSON fields."""
    header: dict[str, Any] = {**(extra or {}), "key": sample.key, "images": [len(image) for image in sample.images]}
    if any(sample.frames):
        header["frames"], sample = list(sample.frames), without_frames(sample)
    if sample.conversations:
        header["conversations"] = [{"from": role, "value": text} for role, text in sample.conversations]
    elif sample.caption is not None:
        header["caption"] = sample.caption
    else:
        header["text"] = sample.text
    data = json.dumps(header, ensure_ascii=False).encode()
    return b"".join([MAGIC, len(data).to_bytes(4, "little"), data, *sample.images])


def unpack(record: bytes) -> tuple[dict[str, Any], RawSample]:
    """(header, sample) of a record. Raises BadSample: "bad_record", or the reason of its text part."""
    header, images = split(record)
    sample = dataclasses.replace(text_of(header), key=header["key"], images=images)
    return header, with_frames(sample, frames_of(header))


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


def frames_of(header: Mapping[str, Any]) -> list[int]:
    """``RawSample.frames`` of a record's images, 0 for those that are not frames. Raises BadSample "bad_record"."""
    count = len(header.get("images", ()))
    frames = header.get("frames") or [0] * count
    if not isinstance(frames, list) or len(frames) != count or not all(isinstance(n, int) and n >= 0 for n in frames):
        raise BadSample("bad_record", detail=f"'frames' must number the {count} images")
    return frames


def text_of(header: Mapping[str, Any]) -> RawSample:
    """The text part of a record. Raises BadSample."""
    images = sum(number < 2 for number in frames_of(header))  # marks: one for all frames of a video
    if "text" in header and "caption" not in header and "conversations" not in header:
        return RawSample(text=checked_text(header["text"], "empty_text"))
    texts = {name: header[name] for name in ("caption", "conversations") if name in header}
    return from_record(texts, Reading(images=images))


class Reader:
    """Random access to the ``count`` records of one file. Raises BadSample "corrupt_file", StorageError."""

    def __init__(self, path: str):
        from array_record.python.array_record_module import ArrayRecordReader

        place = local_copy(path)
        with storage(path), open(place, "rb", buffering=0) as file:  # the library does not say why it cannot read
            file.read(1)
        try:
            self._reader = ArrayRecordReader(place, "readahead_buffer_size:0")
            self.count = self._reader.num_records()
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample("corrupt_file", detail=str(error).splitlines()[0]) from None

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The records of ``rows``. Raises BadSample "corrupt_chunk"."""
        try:
            return self._reader.read(list(rows))
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample("corrupt_chunk", detail=str(error).splitlines()[0]) from None


_local = threading.local()


def forget_readers() -> None:
    """Closes this thread's readers."""
    _local.pid = None


def reader(path: str) -> Reader:
    """This thread's reader of a file; the most recently used ones are kept."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid, _local.readers = os.getpid(), functools.lru_cache(maxsize=_FILES_KEPT)(Reader)
    return _local.readers(path)
