"""A sample as it is stored: encoded images, and a caption, a conversation or plain text."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from typing import Any

from data_pipelines.errors import BadSample

MAX_TEXT_BYTES = 16 << 20  # a longer text part is not read: no caption or conversation is that long

IMAGE = "<image>"  # stands for an image in the text of a sample
_ADVICE = "write the file as UTF-8"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Form(enum.IntEnum):
    """What the bytes of a sample's text part are."""

    NONE = 0
    CAPTION = 1  # the bytes are the caption
    JSON = 2  # an object, see ``layouts``
    TEXT = 3  # the bytes are plain text


@dataclasses.dataclass(frozen=True)
class Video:
    """A video as a record names it (a path, a URL) or holds it (bytes); the part from ``start`` to ``stop`` seconds.

    ``source`` may also be the paths of images, which are its frames.
    """

    source: str | bytes | tuple[str, ...]
    start: float = 0.0
    stop: float = math.inf


@dataclasses.dataclass(frozen=True)
class RawSample:
    """Encoded images and the text that belongs to them: one of ``caption``, ``conversations`` and ``text``.

    Attributes:
      key: unique within the source: "SHARD/KEY" or "FILE:LINE". Empty while a shard is being read.
      images: encoded images in order of appearance.
      caption: of an image-text pair.
      conversations: turns (speaker, text), the speaker being "human", "gpt" or "system".
      text: plain text; with images a document in which ``<image>`` stands for each.
      frames: the number of each image within a video, from 1; 0 = an image. Empty if there is no video.
      frame_tiles: maximum tiles of a frame.
      max_tiles: maximum tiles of its images, 0 = as in the config. jpeg_augment: as if set in the config.
      id: the record's own, for reports.
      image_refs: the images as the text part names (a path, a URL) or holds them (bytes), and videos, until they are
        read.
    """

    key: str = ""
    images: tuple[bytes, ...] = ()
    caption: str | None = None
    conversations: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    image_refs: tuple[str | bytes | Video, ...] = ()
    frames: tuple[int, ...] = ()
    frame_tiles: int = 1
    max_tiles: int = 0
    jpeg_augment: bool = False
    id: str = dataclasses.field(default="", compare=False)

    @property
    def content(self) -> str:
        """The whole text, turns separated by newlines: for lengths, hashes and language."""
        if self.conversations:
            return "\n".join(value for _, value in self.conversations)
        return self.caption if self.caption is not None else self.text or ""

    @property
    def identity(self) -> str:
        """Equal only for texts that are encoded the same way: a caption itself, others with their form and speakers."""
        if self.conversations:
            return json.dumps(self.conversations)
        return self.caption if self.caption is not None else f"text\0{self.text}"


def decode_text(data: bytes, what: str = "caption") -> str:
    """UTF-8 text (a byte order mark is dropped). Raises BadSample "<what>_not_utf8"."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{what}_not_utf8", detail=f"{error}; {_ADVICE}") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object; a list of turns becomes a conversation object. Raises BadSample "broken_json"."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON and UTF-8 errors
        advice = f"; {_ADVICE}" if isinstance(error, UnicodeDecodeError) else ""
        raise BadSample("broken_json", detail=f"{error}{advice}") from None
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"conversations": value}
    if not isinstance(value, dict):
        raise BadSample("broken_json", detail=f"{type(value).__name__} instead of an object")
    return value


def checked_text(text: Any, reason: str) -> str:
    """``text`` if it is a non-blank text that a tokenizer accepts.

    Raises BadSample ``reason``, or "caption_not_utf8" for bytes and lone surrogates, which JSON can express.
    """
    if isinstance(text, bytes):
        raise BadSample("caption_not_utf8", detail=repr(text[:40]))
    if not isinstance(text, str) or not text.strip():
        raise BadSample(reason, detail=f"{type(text).__name__} of length {len(text) if isinstance(text, str) else 0}")
    if _SURROGATE.search(text):
        raise BadSample("caption_not_utf8", detail="lone surrogate")
    return text
