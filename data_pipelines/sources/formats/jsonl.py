"""Instruction data: JSONL or a JSON list in LLaVA form, and InternVL meta files that list several of them.

One sample a line (or list element)::

    {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": ...}, ...]}

Without "image" it is a text-only sample; {"image", "caption"} and {"text"} are taken too. Image paths are relative to
``image_root`` (default: the folder of the file). Where a few of many images have changed, ``index --force`` makes the
index again: see ``stamp`` for what is noticed without. An InternVL meta file is an object
{NAME: {"root", "annotation", "repeat_time"}}; ``repeat_time`` offers a data set several times or in part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records import image_header as headers
from data_pipelines.records.text_record import MAX_TEXT_BYTES, Form, Record, from_object, parse_json
from data_pipelines.sources.indexed import IndexedSource, Shard
from data_pipelines.sources.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

_WINDOW = 1 << 22
_STRING_MARK = re.compile(rb'["\\]')
_STRUCTURE = re.compile(rb'[\[\]{}"]')
_CLOSING = {b"[": b"]", b"{": b"}"}
_SCALAR = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[^\s,"]+', re.S)
_FIRST_NAME = re.compile(rb'\{\s*("[^"\\]{0,100}")\s*:')
_IMAGE_FIELD = re.compile(rb'"images?"\s{0,100}:\s{0,100}("(?:[^"\\]|\\.)*"|\[[^\[\]{}]*\])')
_SAMPLED = 1 << 14  # bytes looked at for an image's path
_MOST_PROBLEMS = 1000  # of a list
_OVERLAP = 1000  # bytes: longer than what _search looks for


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
        if _is_list(view):
            elements = ((number, *place) for number, place in enumerate(_list_elements(view, builder.problems), 1))
        else:
            elements = lines(view)
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


def stamp(path: str, options: Mapping[str, Any]) -> str:
    """Changes when the file does, or any of some 100 images (8 of remote files) that are drawn from all over it.

    So it is noticed when images arrive, go or are replaced together, and not when this befalls a few of many.
    """
    most = 8 if storage.is_remote(path) else 100
    root = storage.parent(path) if options.get("image_root") is None else options["image_root"]
    names = _image_names(path, most)
    names = random.Random(0).sample(names, min(most, len(names)))
    return storage.digest(storage.stamp(path), *(_mark(storage.join(root, name)) for name in names))


def _image_names(path: str, most: int) -> list[str]:
    """Different image paths in the file: all of a small one, else the first behind each of ``most`` places."""
    blob = storage.Blob(path)
    if blob.size <= most * _SAMPLED:
        fields = _IMAGE_FIELD.findall(blob.read(0, blob.size))
    else:
        places = random.Random(0).sample(range(blob.size), most)  # even steps might fall in with the data's own
        fields = [found.group(1) for at in places if (found := _IMAGE_FIELD.search(blob.read(at, _SAMPLED)))]
    names: dict[str, None] = {}
    for field in fields:
        with contextlib.suppress(ValueError):
            value = json.loads(field)
            images = value if isinstance(value, list) else [value]
            names.update((image, None) for image in images if isinstance(image, str))
    return list(names)


def _mark(path: str) -> str:
    try:
        return storage.stamp(path)
    except (DataError, OSError, ValueError):  # ValueError: a NUL character in the path
        return "missing"


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


def _list_elements(view: storage.ScanView, problems: list[str]) -> Iterator[tuple[int, int]]:
    """(offset, length) of every element of a JSON list; each is parsed on its own later.

    Of a damaged list, those that can be told apart: behind a place where brackets do not match, the next element is the
    next object that begins with the same name as the first. What is wrong is appended to ``problems``; when they are
    too many, the rest counts as one element.
    """
    position = view.read(0, 4096).index(b"[") + 1
    begin: re.Pattern[bytes] | None = None
    while position < view.size:
        for start, stop in _matched(view, position):
            if stop <= start:
                break
            yield from _scalars(view, position, start)
            yield start, stop - start
            begin, position = begin or _beginning(view, start), stop
        ended, closed = start == view.size, start == stop
        if closed and not view.read(start + 1, 4096).strip():
            yield from _scalars(view, position, start)
            return
        problems.append(
            "truncated: the list is not closed" if ended else f"corrupt: brackets do not match at byte {start}"
        )
        if len(problems) > _MOST_PROBLEMS:  # each may cost the reading of MAX_TEXT_BYTES
            problems.append(f"corrupt: given up at byte {position}")
            yield position, view.size - position
            return
        comma, after = _search(view, begin or _beginning(view, start), position if ended else start + 1)
        yield from _scalars(view, position, min(start, comma))
        if not ended and not closed:
            yield start, comma - start
        position = after


def _matched(view: storage.ScanView, position: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the list's elements that are in brackets, from ``position`` on.

    The last pair is no whole element: stop = start at the bracket that closes the list, -1 where an element begins
    that is not closed rightly or exceeds MAX_TEXT_BYTES, and (size, -1) at the end of the file.
    """
    opened, start = bytearray(), view.size
    for at, mark in _brackets(view, position):
        if not opened:
            start = at
        if mark in _CLOSING:
            opened += _CLOSING[mark]
        elif not opened:
            yield at, at
            return
        elif opened.pop() != mark[0]:
            break
        elif not opened:
            yield start, at + 1
            start = view.size
        if opened and at - start > MAX_TEXT_BYTES:
            break
    yield start, -1


def _brackets(view: storage.ScanView, position: int) -> Iterator[tuple[int, bytes]]:
    """(position, bracket) of all brackets outside strings."""
    in_string = False
    while chunk := view.read(position, _WINDOW):
        at = 0
        while found := (_STRING_MARK if in_string else _STRUCTURE).search(chunk, at):
            at, mark = found.end(), found.group()
            if mark == b"\\":
                at += 1  # perhaps beyond this chunk
            elif mark == b'"':
                in_string = not in_string
            else:
                yield position + at - 1, mark
        position += max(at, len(chunk))


def _scalars(view: storage.ScanView, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what stands between the elements in brackets: no samples, but they count."""
    if stop - start > MAX_TEXT_BYTES:
        yield start, stop - start
        return
    for found in _SCALAR.finditer(view.read(start, stop - start)):
        yield start + found.start(), len(found.group())


def _beginning(view: storage.ScanView, start: int) -> re.Pattern[bytes]:
    """How an object begins that is like the one at ``start``, with the comma before it."""
    name = _FIRST_NAME.match(view.read(start, 1000))
    return re.compile(rb"(,\s{0,100})\{\s{0,100}" + (re.escape(name.group(1)) + rb"\s{0,100}:" if name else b'"'))


def _search(view: storage.ScanView, pattern: re.Pattern[bytes], position: int) -> tuple[int, int]:
    """Where a match begins and where its first group ends; the size of the file twice if there is none."""
    while chunk := view.read(position, _WINDOW):
        if found := pattern.search(chunk):
            return position + found.start(), position + found.end(1)
        position += max(len(chunk) - _OVERLAP, 1)
    return view.size, view.size


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
