"""Picture files that are damaged, unusual or no pictures at all.

A model's tools must answer about each of them, or refuse it by name: never crash, never hang.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

Encode = Callable[[Image.Image], bytes]


def _saved(kind: str, **options: object) -> Encode:
    def encode(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


def _as(mode: str, kind: str) -> Encode:
    return lambda picture: _saved(kind)(picture.convert(mode))


def _resized(width: int, height: int) -> Encode:
    return lambda picture: _saved("PNG")(picture.resize((width, height)))


def _cut(share: float, kind: str) -> Encode:
    def encode(picture: Image.Image) -> bytes:
        data = _saved(kind)(picture)
        return data[: int(share * len(data))]

    return encode


def _flipped(kind: str) -> Encode:
    """One byte in a hundred is another one, the first hundred left alone."""

    def encode(picture: Image.Image) -> bytes:
        data = np.frombuffer(_saved(kind)(picture), np.uint8).copy()
        rng = np.random.default_rng(0)
        places = rng.integers(min(100, len(data) - 1), len(data), max(1, len(data) // 100))
        data[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
        return data.tobytes()

    return encode


def _turned_by_exif(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return _saved("JPEG", exif=exif)(picture)


def _animated(picture: Image.Image) -> bytes:
    return _saved("GIF", save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])(picture)


def _sixteen_bit(picture: Image.Image) -> bytes:
    grey = np.asarray(picture.convert("L"), np.uint16) * 257
    return _saved("PNG")(Image.fromarray(grey))


BROKEN: Mapping[str, Encode] = {
    "empty": lambda picture: b"",
    "one byte": lambda picture: b"\x89",
    "text": lambda picture: b"this is not a picture",
    "html": lambda picture: b"<!doctype html><html><body>404 not found</body></html>",
    "png header only": lambda picture: b"\x89PNG\r\n\x1a\n",
    "jpeg cut at 10 %": _cut(0.1, "JPEG"),
    "jpeg cut at 90 %": _cut(0.9, "JPEG"),
    "png cut at 50 %": _cut(0.5, "PNG"),
    "jpeg with flipped bytes": _flipped("JPEG"),
    "png with flipped bytes": _flipped("PNG"),
    "webp with flipped bytes": _flipped("WEBP"),
    "one pixel": _resized(1, 1),
    "one pixel high": _resized(2000, 1),
    "one pixel wide": _resized(1, 2000),
    "very wide": _resized(4000, 20),
    "grey": _as("L", "PNG"),
    "black and white": _as("1", "PNG"),
    "palette": _as("P", "PNG"),
    "transparent": _as("RGBA", "PNG"),
    "grey, transparent": _as("LA", "PNG"),
    "16 bit": _sixteen_bit,
    "cmyk jpeg": _as("CMYK", "JPEG"),
    "turned by exif": _turned_by_exif,
    "progressive jpeg": _saved("JPEG", progressive=True),
    "animated gif": _animated,
    "bmp": _saved("BMP"),
    "tiff": _saved("TIFF"),
    "webp": _saved("WEBP"),
}
