"""Plain text from markup and file names."""

from __future__ import annotations

import html
import re


def one_line(text: str) -> str:
    """The text without tags, entities, line breaks and heading-link marks."""
    return " ".join(re.sub(r"<[^<>]*>", " ", html.unescape(html.unescape(text))).replace("¶", "").split())


def spelled_out(stem: str) -> str:
    """The words of a file name, without numbers."""
    return " ".join(word for word in re.split(r"[\W_]+", stem) if not word.isdigit())
