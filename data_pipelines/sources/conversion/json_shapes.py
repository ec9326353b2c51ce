"""JSON files that are neither lines nor a list: wrapped lists, COCO, one object, objects in a row, UTF-16."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import blobs
from data_pipelines.records.names import CAPTION_FIELDS, CONVERSATION_FIELDS, FILE_FIELDS, IMAGE_FIELDS

_HEAD = 1 << 18  # bytes looked at to see whether a file holds lines
_LARGEST = 1 << 32  # bytes of a file that is parsed as a whole
_WRAPPERS = ("data", "samples", "annotations", "records", "rows", "items", "examples", "instances", "dataset", "train")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WRAPPED = re.compile(
    r'\{\s*(?:"[^"]{0,100}"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[-\w.]+|\{[^{}]*\})\s*,\s*)*"([^"]{1,100})"\s*:\s*\[\s*\{'
)
_SPACES = re.compile(r"\s*")


def line_of(record: Any) -> bytes:
    """A record as a line of JSONL."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def records_of(path: str) -> Iterator[Any] | None:
    """The records in a file of one of these shapes; None if it holds lines or a list, which are read in place.

    Raises DataError that names the file, the line and what is wrong in it.
    """
    blob = blobs.blob(path)
    head = blob.read(0, _HEAD)
    if not head.startswith(_UTF16):
        head = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if head[:1] != b"{" or _holds_lines(head, blob.size):
            return None
    if blob.size > _LARGEST:
        raise DataError(
            f"{path}: neither JSONL nor a JSON list, and too large to be converted: write one object a line"
        )
    return _parsed(path, blob.read(0, blob.size))


def _holds_lines(head: bytes, size: int) -> bool:
    """Whether a file that begins with an object holds one in each line."""
    first, newline, _ = head.partition(b"\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError) as error:
        if not newline:  # a line longer than the head
            found = _WRAPPED.match(first[:65536].decode("utf-8", "replace"))
            return found is None or found.group(1) not in (*_WRAPPERS, "images", "info", "licenses")
        ended = (
            isinstance(error, json.JSONDecodeError) and error.pos >= len(first.decode("utf-8", "replace").rstrip()) - 1
        )
        return not ended  # an object that goes on in the next line is no line
    return not isinstance(value, dict) or _wrapped(value) is None


def _parsed(path: str, data: bytes) -> Iterator[Any]:
    """All objects in the data, those that wrap others replaced by them."""
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: neither UTF-8 nor UTF-16 ({error.reason} at byte {error.start})") from None
    decoder, position = json.JSONDecoder(), _SPACES.match(text).end()
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", position)
            why = getattr(error, "msg", "nested too deeply")
            raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: broken JSON ({why})") from None
        wrapped = _wrapped(value) if isinstance(value, dict) else value if isinstance(value, list) else None
        yield from [value] if wrapped is None else wrapped
        position = re.compile(r"[\s,]*").match(text, position).end()


def _wrapped(value: Mapping[str, Any]) -> list[Any] | None:
    """The records that an object only wraps: COCO's annotations with their images, a list under a usual name."""
    lists = {name: items for name, items in value.items() if isinstance(items, list) and items}
    lists = {name: items for name, items in lists.items() if all(isinstance(item, dict) for item in items[:9])}
    if "annotations" in lists and "images" in lists:
        return _coco(lists["images"], lists["annotations"])
    known = (*CONVERSATION_FIELDS, *CAPTION_FIELDS, *IMAGE_FIELDS[:1])
    if any(value.get(name) for name in known):
        return None  # a record of its own
    name = next((name for name in _WRAPPERS if name in lists), None)
    if name is None and "images" in lists and any(field in lists["images"][0] for field in CAPTION_FIELDS):
        name = "images"  # Karpathy's splits
    return None if name is None else lists[name]


def _coco(images: list[dict], annotations: list[dict]) -> list[dict]:
    """A record for each image with all its captions, or for each annotation that has other text."""
    files = {each.get("id"): next((each[name] for name in FILE_FIELDS if each.get(name)), None) for each in images}
    if not any("caption" in each for each in annotations):
        return [{**each, "image": files.get(each.get("image_id"))} for each in annotations]
    captions: dict[Any, list[Any]] = {}
    for each in annotations:
        captions.setdefault(each.get("image_id"), []).append(each.get("caption"))
    return [{"id": key, "image": files.get(key), "caption": texts} for key, texts in captions.items()]
