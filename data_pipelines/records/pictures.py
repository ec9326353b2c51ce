"""Images in a record: where they are named or stored, and fields that look like images or video but are not read."""

from __future__ import annotations

import ast
import base64
import binascii
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats, names
from data_pipelines.records.raw_sample import Video

Reference = str | bytes | Video  # the path or URL of an image, or the encoded image itself; or a video

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.=+-]+)*?(;base64)?,", re.I)
_BASE64_IMAGE = re.compile(r"(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/_\r\n-]{60}")
_LINE_END = re.compile(r"[ \t]*(?:\n|\Z)")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_HELD = ("bytes", "data", "base64", "b64", "image_bytes", "raw")  # keys of a struct that holds the image itself
_NAMED = ("path", "url", "file_name", "filename", "file", "src", "uri", "image_url", "image", "image_path", "name")
_LONGEST_PATH = 4096
_HOLDERS = (str, bytes, list, tuple, dict)
_TEXTS = frozenset(
    [
        *(*names.CAPTION_FIELDS, *names.CONVERSATION_FIELDS, *names.QUESTION_FIELDS, *names.ANSWER_FIELDS),
        *(*names.SYSTEM_FIELDS, *names.HINT_FIELDS, *names.CHOICE_FIELDS, *names.ID_FIELDS, "input"),
        names.HISTORY_FIELD,
    ]
)


def given(value: Any) -> bool:
    """Whether a field holds anything: tables fill missing values with null, NaN, "", [] or structs of nulls."""
    if type(value) is str:
        return value != ""
    if value is None or (isinstance(value, float) and value != value):
        return False
    if isinstance(value, dict):
        return any(map(given, value.values()))
    if isinstance(value, list | tuple):
        return any(map(given, value))
    return value != ""  # bytes count even if empty: an empty image


def references(value: Any, inner: bool = False) -> list[Reference]:
    """The images in a field, in order; nulls in a list are left out. Raises BadSample "bad_image_field"."""
    if isinstance(value, str):
        listed = _listed(value)
        return [_of_text(value)] if listed is None else [_of_text(text) for text in listed]
    if isinstance(value, bytes | bytearray | memoryview):
        return [bytes(value)]
    if isinstance(value, dict):
        return [_of_struct(value)]
    if isinstance(value, list | tuple):
        if len(value) > 60 and all(isinstance(item, int) and 0 <= item < 256 for item in value):
            return [bytes(value)]  # list<uint8>
        return [found for item in value if given(item) for found in references(item, True)]
    what = f"{'a list of ' if inner else ''}{type(value).__name__}"
    raise BadSample("bad_image_field", detail=f"an image must be a path, bytes or a list of these, not {what}")


def _listed(text: str) -> list[str] | None:
    """The texts in a list that was written as text in JSON or Python syntax; None for other texts."""
    if text[:2] not in ('["', "['") or text[-1:] != "]":
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def _of_text(text: str) -> Reference:
    found = _DATA_URI.match(text)
    if found is not None:
        if not found.group(2):
            raise BadSample("bad_image_field", detail=f"a data URI without base64: {text[:40]!r}")
        return _decoded(text[found.end() :])
    if len(text) >= 64 and _BASE64_IMAGE.match(text):
        return _decoded(text)
    if len(text) > _LONGEST_PATH:
        raise BadSample("bad_image_field", detail=f"neither a path nor base64 of an image: {text[:40]!r}")
    return text


def _decoded(text: str) -> bytes:
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("bad_image_field", detail=f"broken base64: {error}") from None


def _of_struct(value: Mapping[str, Any]) -> Reference:
    source = value.get("source")
    if isinstance(source, dict):
        return _of_struct(source)
    for key in _HELD:
        if given(held := value.get(key)):
            return _decoded(held) if isinstance(held, str) and not held.startswith("data:") else references(held)[0]
    for key in _NAMED:
        if given(held := value.get(key)):
            return references(held)[0]
    raise BadSample("bad_image_field", detail=f"an image with neither bytes nor path; its keys: {', '.join(value)}")


def image_fields(record: Mapping[str, Any], fields: Sequence[str] = names.IMAGE_FIELDS) -> Iterator[tuple[str, Any]]:
    """(name, value) of the filled fields that hold images; ``record`` has names in lower case."""
    ranked, numbered, files = _names_of(tuple(record), tuple(fields))
    if numbered and numbered[0] == "image" and sum(given(record[name]) for name in numbered) > 1:
        yield "image", [record[name] for name in numbered if given(record[name])]
    for name in ranked:
        if given(record[name]):
            yield name, record[name]
    if values := [record[name] for name in numbered if given(record[name])]:
        yield numbered[0], values
    for name in files:
        value = record[name]
        if isinstance(value, str) and names.IMAGE_NAME.search(value):
            yield name, value


@functools.lru_cache(maxsize=256)
def _names_of(keys: tuple[str, ...], fields: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """(those in ``fields``, numbered ones, those of files) among the keys of a record, each by priority."""
    numbers = {name: int(found.group(1)) for name in keys if (found := names.NUMBERED_IMAGE.fullmatch(name))}
    ranked = dict.fromkeys(name for name in fields if name in keys)
    if len(fields) > 1:  # the field was not specified
        ranked |= dict.fromkeys(name for name in keys if names.IMAGE_FIELD.fullmatch(name))
    if "image" in keys and min(numbers.values(), default=0) > 1:  # image, image2, image3
        numbers["image"] = 1
    numbered = sorted(numbers, key=lambda name: (numbers[name], name))
    return tuple(ranked), tuple(numbered), tuple(name for name in names.FILE_FIELDS if name in keys)


@functools.lru_cache(maxsize=4096)
def _medium(name: str) -> str:
    """ "video", "audio", "document" or "text" for a field of that name, "" for other fields."""
    fields = (("video", names.VIDEO_FIELD), ("audio", names.AUDIO_FIELD), ("document", names.DOCUMENT_FIELD))
    if found := next((medium for medium, pattern in fields if pattern.fullmatch(name)), ""):
        return found
    return "text" if name in _TEXTS else ""


def check_unread(record: Mapping[str, Any], images: bool, videos: bool = False) -> None:
    """Raises BadSample "unread_audio", (without ``images``) "unread_document", "unread_image_field", (without
    ``videos``) "unread_video" or "unexpected_video".

    Training on the rest of such a record would teach the model to answer about something it has not seen.
    """
    for name, value in record.items():
        medium = _medium(name)
        if medium == "text" or not isinstance(value, _HOLDERS):
            continue
        if medium == "audio" and given(value):
            raise BadSample("unread_audio", detail=f"{name}: {str(value)[:80]}")
        if medium == "video" and given(value) and not videos:
            extra_formats.refuse_video(f"{name}: {str(value)[:80]}")
        of_document = medium == "document"
        for held in _inner(value):
            path = _as_path(held)
            if of_document and not images and _is_document(held):
                raise BadSample("unread_document", detail=f"{name}: {str(held)[:80]}; draw its pages as images")
            if path and names.AUDIO_NAME.search(path):
                raise BadSample("unread_audio", detail=f"{name}: {path[:80]}")
            if path and not videos and names.VIDEO_NAME.search(path):
                extra_formats.refuse_video(f"{name}: {path[:80]}")
            if not images and looks_like_an_image(held):
                raise BadSample(
                    "unread_image_field", detail=f"{name}: {str(value)[:80]}; say what it is with image_key"
                )


def check_ids(records: Sequence[Mapping[str, Any]], talk: bool) -> None:
    """Raises BadSample "unread_image_field" or "unread_video" if a field says which image the text is about.

    Args:
      records: a record without images and videos, and its turns.
      talk: whether its text is a conversation; plain text may well come from a video.
    """
    for record in records:
        for name, medium in _ids_of(tuple(record)):
            if given(value := record[name]) and isinstance(value, str | int) and (talk or medium == "image"):
                advice = "is not in the record: name it in a separate field, or leave this field out"
                reason = "unread_image_field" if medium == "image" else "unread_video"
                raise BadSample(reason, detail=f"{name}: {str(value)[:80]}; the {medium} {advice}")


@functools.lru_cache(maxsize=256)
def _ids_of(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(name, "image" or "video") of the fields that say which one a record is about."""
    found = [(name, names.MEDIA_ID.fullmatch(name)) for name in keys]
    return tuple((name, "image" if match.group(1) else "video") for name, match in found if match)


def _inner(value: Any, depth: int = 4) -> Iterator[str | bytes]:
    """The texts and bytes in a field, in lists (of which only the first item is used) and in objects."""
    if isinstance(value, str | bytes):
        yield value
    elif isinstance(value, list | tuple) and value and depth:
        yield from _inner(value[0], depth - 1)
    elif isinstance(value, dict) and depth:
        for item in value.values():
            yield from _inner(item, depth - 1)


def _is_document(held: str | bytes) -> bool:
    named = isinstance(held, str) and " " not in held and names.DOCUMENT_NAME.search(_as_path(held))
    return bool(named) or held[:5] in ("%PDF-", b"%PDF-")


def _as_path(text: str | bytes) -> str:
    """``text`` if it may be a path, otherwise ""."""
    is_path = isinstance(text, str) and len(text) <= _LONGEST_PATH and text.count(" ") < 3 and "\n" not in text
    return text if is_path else ""


def looks_like_an_image(value: str | bytes) -> bool:
    """Whether these are the first bytes of an image, or a text that names or holds one."""
    if isinstance(value, bytes):
        return value.startswith(_MAGIC) or bool(extra_formats.kind_of(value))
    return bool(names.IMAGE_NAME.search(_as_path(value)) or value[:11] == "data:image/" or _BASE64_IMAGE.match(value))


def image_link(text: str) -> str:
    """The first image that ``text`` shows with a Markdown or HTML tag, not counting tags in code; or ""."""
    if "](" not in text and "<img" not in text.lower():
        return ""
    found = names.IMAGE_LINK.search(names.CODE.sub(" ", text))
    return found.group() if found else ""


def placed_link(text: str) -> str:
    """Like ``image_link``, if it is where sets place the image in question: on its own line or at an end of the text.

    Web pages and programs that are the subject of a question contain such tags among other HTML tags: these are text.
    """
    if not image_link(text):
        return ""
    text = names.CODE.sub(" ", text).strip()
    in_html, end = names.OTHER_TAG.search(text) is not None, 0
    for found in names.IMAGE_LINK.finditer(text):
        begins = text[end : found.start()].rstrip(" \t")[-1:] == "\n" or found.start() == 0
        start, end = found.span()
        ends = _LINE_END.match(text, end) is not None
        at_an_end = start == 0 or end == len(text)
        if ((begins and ends) or at_an_end) and not (found.group()[0] == "<" and in_html):
            return found.group()
    return ""
