"""A sample as it is stored: encoded images, and a caption, a conversation or plain text, parsed from text or JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import BadSample

MAX_TEXT_BYTES = 16 << 20  # a longer text part is not read: no caption or conversation is that long

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class Form(enum.IntEnum):
    """What the bytes of a sample's text part are."""

    NONE = 0
    CAPTION = 1  # the bytes are the caption
    JSON = 2  # an object with "caption", "conversations" (or "messages") or "text"
    TEXT = 3  # the bytes are plain text


@dataclasses.dataclass(frozen=True)
class RawSample:
    """Encoded images and the text that belongs to them: one of ``caption``, ``conversations`` and ``text``.

    Attributes:
      key: unique within the source: "SHARD/KEY" or "FILE:LINE". Empty in a sample that is part of a shard's reading.
      images: encoded images in order of appearance.
      caption: of an image-text pair.
      conversations: turns (speaker, text), the speaker being "human", "gpt" or "system".
      text: plain text.
      image_paths: files of the images, as the text part names them, until they are read (JSONL only).
    """

    key: str = ""
    images: tuple[bytes, ...] = ()
    caption: str | None = None
    conversations: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    image_paths: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """The whole text, turns separated by newlines: for lengths, hashes and language."""
        if self.conversations:
            return "\n".join(value for _, value in self.conversations)
        return self.caption if self.caption is not None else self.text or ""


def decode_text(data: bytes, what: str = "caption") -> str:
    """UTF-8 text (a byte order mark is dropped). Raises BadSample "<what>_not_utf8"."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{what}_not_utf8", detail=str(error)) from None


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadSample "broken_json"."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON and UTF-8 errors
        raise BadSample("broken_json", detail=str(error)) from None
    if not isinstance(value, dict):
        raise BadSample("broken_json", detail=f"{type(value).__name__} instead of an object")
    return value


def parse(form: int, data: bytes, caption_key: str = "caption") -> RawSample:
    """The text in the bytes of a text part.

    Raises BadSample: "no_caption", "caption_not_utf8", "text_not_utf8", "broken_json", "bad_conversation",
    "empty_text", "bad_image_field".
    """
    if form == Form.CAPTION:
        return RawSample(caption=_checked_text(decode_text(data), "no_caption"))
    if form == Form.TEXT:
        return RawSample(text=_checked_text(decode_text(data, "text"), "empty_text"))
    if form == Form.JSON:
        return from_object(parse_json(data), caption_key)
    raise BadSample("no_caption", detail="no text part")


def from_object(value: Mapping[str, Any], caption_key: str = "caption") -> RawSample:
    """The text in a JSON object: LLaVA and InternVL conversations, chat messages, a caption, or plain text."""
    paths = _image_paths(value)
    turns = value.get("conversations", value.get("messages"))
    if turns is not None:
        return RawSample(conversations=_turns(turns), image_paths=paths)
    if caption_key in value or paths or "text" not in value:
        return RawSample(caption=_checked_text(value.get(caption_key), "no_caption"), image_paths=paths)
    return RawSample(text=_checked_text(value.get("text"), "empty_text"))


def _checked_text(text: Any, reason: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadSample(reason, detail=f"{type(text).__name__} of length {len(text) if isinstance(text, str) else 0}")
    if _SURROGATE.search(text):  # JSON can spell lone ones, which no tokenizer accepts
        raise BadSample("caption_not_utf8", detail="lone surrogate")
    return text


def _image_paths(value: Mapping[str, Any]) -> tuple[str, ...]:
    images = value.get("image", value.get("images"))
    if images is None or images == "":
        return ()
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadSample("bad_image_field", detail=f"image must be a path or a list of paths, is {str(images)[:80]!r}")
    return tuple(images)


def _turns(turns: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, list) or not turns:
        raise BadSample("bad_conversation", detail="conversations must be a list with at least one turn")
    result = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadSample("bad_conversation", detail=f"turn is a {type(turn).__name__}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in _ROLES:
            raise BadSample("bad_conversation", detail=f"unknown speaker {str(role)[:40]!r}")
        if not isinstance(text, str):
            raise BadSample("bad_conversation", detail=f"turn text is a {type(text).__name__}")
        result.append((_ROLES[role], text))
    if not any(text.strip() for _, text in result):
        raise BadSample("bad_conversation", detail="all turns are empty")
    _checked_text(" ".join(text for _, text in result), "bad_conversation")
    return tuple(result)
