"""The opening of every HTML page of the project, and embedded pictures."""

from __future__ import annotations

import base64
import html
from pathlib import PurePath

_KINDS = {"jpg": "jpeg", "svg": "svg+xml"}


def opening(title: str, style: str) -> str:
    """The head of a self-contained page."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style>"
    )


def data_url(data: bytes, kind: str) -> str:
    """An encoded picture as a data URL; ``kind``: "png", "jpeg" and so on."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def kind_of(file: PurePath) -> str:
    """The kind of a picture file, by its suffix."""
    suffix = file.suffix.lower()[1:]
    return _KINDS.get(suffix, suffix)
