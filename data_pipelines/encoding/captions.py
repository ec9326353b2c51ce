"""Cleaning of captions as found on the web."""

from __future__ import annotations

import html
import re

from data_pipelines.encoding.chat import IMAGE
from data_pipelines.errors import BadSample
from data_pipelines.special_tokens import IMAGE_CONTEXT

_SPACES = re.compile(r"\s+")
_LONG_ENTITY = re.compile(r"&#\d{1000,};?")  # html.unescape would raise ValueError for a number of 4300 digits
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufff9-\ufffd]")
_TAGS = re.compile(
    # A tag's name is followed by attributes or by nothing: "a <b and c> d" is not a tag.
    r"<br\s*/?>|</?(?:a|b|i|u|p|div|span|strong|em|font|h[1-6]|li|ul|ol|td|tr|table|img|sup|sub)"
    r"(?:\s+[\w:.-]+\s*=[^<>]*|(?:\s+(?:nowrap|ismap|reversed|compact|hidden))*\s*/?)>",
    re.I,
)
_RESERVED = re.compile(rf"<\|\w+\|>|{IMAGE}|{IMAGE_CONTEXT}|</?s>|</?quad>")


def clean_caption(text: str, max_chars: int = 1000) -> str:
    """A caption as found on the web, cleaned for training.

    Entities become characters. HTML tags, control tokens of the model (except ``<ref>`` and ``<box>``) and control
    characters are dropped. White space becomes single spaces, and text beyond ``max_chars`` is cut at a word boundary.

    Raises BadSample "empty_caption" if nothing is left.
    """
    for _ in range(2):  # since much of the web is double-escaped
        text = html.unescape(_LONG_ENTITY.sub("\ufffd", text))
    text = _RESERVED.sub(" ", _TAGS.sub(" ", _CONTROL.sub("", text)))
    text = _SPACES.sub(" ", text).strip()
    if len(text) > max_chars:
        head = text[: max_chars + 1]
        text = (head.rsplit(" ", 1)[0] if " " in head else head[:max_chars]).strip()
    if not text:
        raise BadSample("empty_caption")
    return text
