"""Instruction data: JSONL or a JSON list in LLaVA form, and InternVL meta files that list several of them.

One sample a line (or list element)::

    {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": ...}, ...]}

Without "image" it is a text-only sample; {"image", "caption"} and {"text"} are taken too. Image paths are relative to
``image_root`` (default: the folder of the file). An InternVL meta file is an object
{NAME: {"root", "annotation", "repeat_time"}}; ``repeat_time`` offers a data set several times or in part.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import headers, storage
from data_pipelines.errors import BadSample, DataError
from data_pipelines.indexed import IndexedSource, Shard
from data_pipelines.records import MAX_TEXT_BYTES, Form, Record, from_object, parse_json
from data_pipelines.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

_WINDOW = 1 << 22
_STRING_MARK = re.compile(rb'["\\]')
_STRUCTURE = re.compile(rb'[\[\]{}"]')


def scan(
    path: str,
    meta: Mapping[str, Any],
    image_root: str | None = None,
    caption_key: str | None = None,
    hash_images: bool = False,
) -> ShardIndex:
    """Indexes a JSONL file or a JSON list, reading each image once. Keys are numbers of lines (or elements), from 1."""
    builder = IndexBuilder()
    root = storage.parent(path) if image_root is None else image_root
    with storage.scan_view(path) as view:
        elements = _list_elements(view) if _is_list(view) else lines(view)
        for number, offset, length in elements:
            record, images, reason, scores, image_hash = None, [], None, {}, 0
            try:
                if length > MAX_TEXT_BYTES:
                    raise BadSample("text_too_large")
                value = parse_json(view.read(offset, length))
                scores = scores_of(value)
                record = from_object(value, caption_key or "caption")
                data = [read_image(storage.join(root, name)) for name in record.images]
                images = [ImagePart(0, len(d), headers.read_header(d).size) for d in data]
                if hash_images and images:
                    image_hash = hash64(b"".join(data))
            except BadSample as error:
                reason, images = error.reason, []
            place = (offset, length if length <= MAX_TEXT_BYTES else 0, Form.JSON)
            builder.add(
                str(number),
                images=images,
                text=place,
                record=record,
                scores=scores,
                image_hash=image_hash,
                reason=reason,
            )
    return builder.build(meta)


def read_image(path: str) -> bytes:
    """The encoded image. Raises BadSample "missing_image", "image_too_many_bytes"."""
    try:
        data = storage.read_bytes(path, headers.MAX_IMAGE_BYTES + 1)
    except (DataError, OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise BadSample("missing_image", detail=str(error)) from None
    headers.check_length(len(data))
    return data


def find(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, str], float]]:
    """(file, options, how often it is offered) for each path; meta files are replaced by what they list."""
    for path in paths:
        entries = meta_entries(path)
        if entries is None:
            yield path, {}, 1.0
        for entry in entries or ():
            yield entry.annotation, {"image_root": entry.root}, entry.repeat_time


class Source(IndexedSource):
    """Lines of JSONL files, whose images are files of their own. Keys are FILE:LINE."""

    key_separator = ":"

    def _images(self, shard: Shard, index: int, record: Record) -> tuple[bytes, ...]:
        root = shard.options.get("image_root")
        root = storage.parent(shard.path) if root is None else root
        return tuple(read_image(storage.join(root, name)) for name in record.images)

    def _captioned(self, shard: Shard, index: int, caption: str) -> Record:
        return dataclasses.replace(self._record(shard, index), caption=caption, conversations=(), text=None)


def _is_list(view: storage.ScanView) -> bool:
    return view.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def lines(view: storage.ScanView) -> Iterator[tuple[int, int, int]]:
    """(number, offset, length) of every line that is not blank, in bounded memory however long a line is."""
    number, start, position, blank = 1, 0, 0, True
    while chunk := view.read(position, _WINDOW):
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            if not (blank and not chunk[at:end].strip()):
                yield number, start, position + end - start
            at, blank = end + 1, True
            number, start = number + 1, position + at
        blank = blank and not chunk[at:].strip()
        position += len(chunk)
    if not blank:
        yield number, start, position - start


def _list_elements(view: storage.ScanView) -> Iterator[tuple[int, int, int]]:
    """(number, offset, length) of every top-level element of a JSON list, found by matching brackets outside strings.

    A list that is damaged gives the elements that can be told apart; each is parsed on its own later.
    """
    depth, start, in_string, position, number = 0, -1, False, 0, 1
    skip = False  # the previous byte was a backslash inside a string
    while chunk := view.read(position, _WINDOW):
        at = 0
        while at < len(chunk):
            if skip:
                skip, at = False, at + 1
                continue
            if in_string:
                found = _STRING_MARK.search(chunk, at)
                if found is None:
                    break
                at = found.end()
                if found.group() == b"\\":
                    skip = True
                else:
                    in_string = False
                continue
            found = _STRUCTURE.search(chunk, at)
            if found is None:
                break
            at = found.end()
            mark = found.group()
            if mark == b'"':
                in_string = True
            elif mark in (b"{", b"["):
                depth += 1
                if depth == 2:
                    start = position + at - 1
            else:
                depth -= 1
                if depth == 1 and start >= 0:
                    yield number, start, position + at - start
                    start, number = -1, number + 1
        position += len(chunk)
    if start >= 0:  # cut off in the middle of an element: it is listed, and found broken when parsed
        yield number, start, view.size - start


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One data set of an InternVL meta file, its paths resolved."""

    annotation: str
    root: str
    repeat_time: float


def meta_entries(path: str) -> list[MetaEntry] | None:
    """The data sets that an InternVL meta file lists, or None if ``path`` is not one.

    Its relative paths are looked up from the working folder, as InternVL does, then from the meta file's own folder.
    Raises DataError if an annotation is missing or repeat_time is not a positive number.
    """
    value = _read_meta(path)
    if value is None:
        return None
    entries = []
    for name, entry in value.items():
        times = entry.get("repeat_time", 1)
        if not isinstance(times, int | float) or not times > 0:
            raise DataError(f"{path}: repeat_time of {name!r} must be a positive number, is {times!r}")
        annotation = _resolve(path, str(entry["annotation"]))
        if not storage.exists(annotation):
            raise DataError(f"{path}: annotation of {name!r} not found: {entry['annotation']}")
        entries.append(MetaEntry(annotation, _resolve(path, str(entry.get("root") or "")), float(times)))
    return entries


def _resolve(meta: str, path: str) -> str:
    if storage.is_remote(meta) or not storage.exists(path):
        return storage.join(storage.parent(meta), path) if path else storage.parent(meta)
    return path


def _read_meta(path: str) -> dict[str, dict[str, Any]] | None:
    if not path.endswith(".json"):
        return None
    with storage.scan_view(path) as view:
        if view.size > 1 << 24 or view.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            return None
        try:
            value = json.loads(view.read(0, view.size))
        except ValueError:
            return None  # JSONL that happens to be named .json
    entries = list(value.values()) if isinstance(value, dict) else []
    if not entries or not all(isinstance(entry, dict) and "annotation" in entry for entry in entries):
        return None
    return value
