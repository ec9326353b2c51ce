"""JSON files that are neither lines nor a list: wrapped lists, COCO, tables by column, one object, adjacent objects.

They may be in UTF-16 or UTF-32, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import blobs
from data_pipelines.records.names import (
    CAPTION_FIELDS,
    CONVERSATION_FIELDS,
    FILE_FIELDS,
    IMAGE_FIELDS,
    IMAGE_NAME,
    QUESTION_FIELDS,
    ROLE_FIELDS,
)

_HEAD = 1 << 18  # bytes examined to see whether a file holds lines
_LARGEST = 1 << 32  # bytes of a file that is parsed as a whole
_WRAPPERS = (
    *("data", "samples", "annotations", "records", "rows", "items", "examples", "instances", "dataset", "questions"),
    *("train", "training", "validation", "val", "test"),
)
KNOWN = frozenset((*CONVERSATION_FIELDS, *CAPTION_FIELDS, *QUESTION_FIELDS, *IMAGE_FIELDS, *FILE_FIELDS))
_KEYED = re.compile(r'\{\s*"([^"]{1,1000})"\s*:\s*[{"\[]')  # an object of records, or of captions by image
_WRAPPED = re.compile(
    r'\{\s*(?:"[^"]{0,100}"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[-\w.]+|\{[^{}]*\})\s*,\s*)*"([^"]{1,100})"\s*:\s*\[\s*\{'
)
_SPACES = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")


def line_of(record: Any) -> bytes:
    """A record as a line of JSONL."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def records_of(path: str) -> Iterator[Any] | None:
    """The records in a file of one of these shapes; None if it holds lines or a list, which are read in place.

    Raises a DataError that names the file, the line and the problem.
    """
    blob = blobs.blob(path)
    head = blob.read(0, _HEAD)
    if json.detect_encoding(head) in ("utf-8", "utf-8-sig"):
        head = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if head[:1] != b"{" or _holds_lines(head, blob.size):
            return None
    if blob.size > _LARGEST:
        raise DataError(
            f"{path}: neither JSONL nor a JSON list, and too large to be converted: write one object per line"
        )
    return _parsed(path, blob.read(0, blob.size))


def is_set(data: bytes) -> bool:
    """Whether a JSON file holds many records, or captions by image, rather than one record or conversation.

    ``data``: the file, or the beginning of a longer one.
    """
    if json.detect_encoding(data) not in ("utf-8", "utf-8-sig"):
        return True
    text = data.decode("utf-8-sig", "replace").lstrip()
    try:
        inner = text[text[:1] == "[" :].lstrip()
        value, end = json.JSONDecoder().raw_decode(inner)
    except (ValueError, RecursionError):
        return False
    if text[:1] == "[":
        return isinstance(value, dict) and not any(name in ROLE_FIELDS for name in map(str.lower, value))
    several = inner[end:].lstrip(" \t\r\n,")[:1] == "{"
    return isinstance(value, dict) and (several or _of_one_object(value) is not None)


def _holds_lines(head: bytes, size: int) -> bool:
    """Whether a file that begins with an object holds one in each line."""
    line, newline, others = head.partition(b"\n")
    text = line.decode("utf-8", "replace").rstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        if not newline:  # a line longer than the head
            found, keyed = _WRAPPED.match(text[:65536]), _KEYED.match(text[:65536])
            known = found is not None and found.group(1) in (*_WRAPPERS, "images", "info", "licenses")
            return not known and (keyed is None or keyed.group(1).lower() in KNOWN)
        # An object that continues on the next line is not a line of its own.
        return not (isinstance(error, json.JSONDecodeError) and error.pos >= len(text) - 1)
    if text[end:].strip()[:1] in ("{", ","):  # several objects in a line, or objects in a list without brackets
        return False
    alone = not others.strip() and len(head) >= size - len(codecs.BOM_UTF8)
    return (_of_one_object(value) if alone else _wrapped(value)) is None


def _parsed(path: str, data: bytes) -> Iterator[Any]:
    """All objects in the data; objects that wrap others are replaced by them."""
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"not {encoding.upper()} ({error.reason} at byte {error.start})"
        raise DataError(f"{path}:{line}: {what}; write the file as UTF-8") from None
    objects = _objects(path, text)
    first, second = next(objects, None), next(objects, None)
    if second is None and isinstance(first, dict):
        found = _of_one_object(first)
        return iter([first] if found is None else found)
    values = itertools.chain([] if first is None else [first], [] if second is None else [second], objects)
    return (record for value in values for record in _unwrapped(value))


def _objects(path: str, text: str) -> Iterator[Any]:
    """The values in a text, one after another. Raises DataError."""
    decoder, position = json.JSONDecoder(), _SPACES.match(text).end()
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", position)
            why = getattr(error, "msg", "nested too deeply")
            raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: broken JSON ({why})") from None
        yield value
        position = _BETWEEN.match(text, position).end()


def _unwrapped(value: Any) -> list[Any]:
    wrapped = _wrapped(value) if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if wrapped is None else wrapped


def _of_one_object(value: Mapping[str, Any]) -> list[Any] | None:
    """The records in the only object of a file; None if it is itself a record.

    Lists wrapped in one or two objects, tables by column (those of pandas too), records by id, captions by image.
    """
    if (wrapped := _wrapped(value)) is not None:
        return wrapped
    for name in _WRAPPERS:
        if isinstance(inner := value.get(name), dict):
            lists = [found for each in _WRAPPERS if _are(dict, found := inner.get(each))]
            return [record for found in lists for record in found] if lists else _of_one_object(inner)
    if _are(str, columns := value.get("columns")) and _are(list, rows := value.get("data")):
        return [dict(zip(columns, row)) for row in rows]  # pandas' orient="split"
    parts = list(value.values())
    known = not KNOWN.isdisjoint(name.lower() for name in value)
    if known and _are(list, parts) and len({len(part) for part in parts}) == 1 < len(parts[0]):
        scalars = not any(isinstance(item, dict | list) for part in parts for item in part)
        return [dict(zip(value, row)) for row in zip(*parts)] if scalars else None
    if _are(dict, parts):
        if known and len({tuple(part) for part in parts}) == 1:  # pandas' default: {COLUMN: {ROW: CELL}}
            return [{name: part[row] for name, part in value.items()} for row in parts[0]]
        records = all(not KNOWN.isdisjoint(name.lower() for name in part) for part in parts)
        return [{"id": key, **part} for key, part in value.items()] if records else None
    captions = all(isinstance(part, str) or _are(str, part) for part in parts)
    if parts and captions and all(IMAGE_NAME.search(name) for name in value):
        return [{"image": name, "caption": part} for name, part in value.items()]
    return None


def _are(kind: type, items: Any) -> bool:
    """Whether this is a non-empty list whose items are of that kind."""
    return isinstance(items, list) and bool(items) and all(isinstance(item, kind) for item in items)


def _wrapped(value: Mapping[str, Any]) -> list[Any] | None:
    """The records that an object only wraps: COCO's annotations with their images, a list under a usual name."""
    lists = {name: items for name, items in value.items() if isinstance(items, list) and items}
    lists = {name: items for name, items in lists.items() if all(isinstance(item, dict) for item in items[:9])}
    if "annotations" in lists and "images" in lists:
        return _coco(lists["images"], lists["annotations"])
    known = (*CONVERSATION_FIELDS, *CAPTION_FIELDS, *IMAGE_FIELDS[:1])
    if any(value.get(name) for name in known):
        return None  # itself a record
    name = next((name for name in _WRAPPERS if name in lists), None)
    if name is None and "images" in lists and any(field in lists["images"][0] for field in CAPTION_FIELDS):
        name = "images"  # Karpathy's splits
    return None if name is None else lists[name]


def _coco(images: list[dict], annotations: list[dict]) -> list[dict]:
    """One record per image with all its captions, or per annotation that has other text."""
    files = {each.get("id"): next((each[name] for name in FILE_FIELDS if each.get(name)), None) for each in images}
    if not any("caption" in each for each in annotations):
        return [{**each, "image": files.get(each.get("image_id"))} for each in annotations]
    captions: dict[Any, list[Any]] = {}
    for each in annotations:
        captions.setdefault(each.get("image_id"), []).append(each.get("caption"))
    return [{"id": key, "image": files.get(key), "caption": texts} for key, texts in captions.items()]
