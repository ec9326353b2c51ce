"""Files that are damaged, unusual or extreme pictures, or no pictures at all, and files made to exhaust memory.

A model's tools must answer about each of them or refuse it by name: never crash, never hang, never allocate memory for
pixels that are not needed.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

Encode = Callable[[Image.Image], bytes]
ANSWERED = "answered"
_MB = 1 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """``encode(picture)`` gives its bytes.

    expected: ``ANSWERED``, the reason of the ``BadSample`` that refuses it, or None where decoders may differ.
    """

    encode: Encode
    expected: str | None = ANSWERED


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
    """Replaces one byte in a hundred, except the first hundred."""

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


def _one_color(value: int) -> Encode:
    return lambda picture: _saved("PNG")(Image.new("RGB", picture.size, (value,) * 3))


def _noise(picture: Image.Image) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (picture.height, picture.width, 3), np.uint8)
    return _saved("PNG")(Image.fromarray(pixels))


def _not_finite(picture: Image.Image) -> bytes:
    values = np.asarray(picture.convert("L"), np.float32).copy()
    values.flat[:4] = np.nan, np.inf, -np.inf, 3e38
    return _saved("TIFF")(Image.fromarray(values))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _zeros(count: int) -> bytes:
    """``count`` zero bytes, deflated a megabyte at a time."""
    deflate, block = zlib.compressobj(1), bytes(_MB)
    parts = [deflate.compress(block[: min(_MB, count - start)]) for start in range(0, count, _MB)]
    return b"".join([*parts, deflate.flush()])


def _png(width: int, height: int, pixels: bytes, *chunks: bytes) -> bytes:
    """A PNG with one bit per pixel and the deflated rows ``pixels``."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _rows(width: int, height: int) -> bytes:
    return _zeros((1 + -(-width // 8)) * height)


def _whole_png(width: int, height: int) -> Encode:
    """Black; a few hundred bytes for each megabyte of pixels."""
    return lambda picture: _png(width, height, _rows(width, height))


def _png_with_text_bomb(picture: Image.Image) -> bytes:
    text = _chunk(b"zTXt", b"Comment\0\0" + _zeros(256 * _MB))
    return _png(64, 64, _rows(64, 64), text)


def _png_that_goes_on(picture: Image.Image) -> bytes:
    return _png(64, 64, _zeros(256 * _MB))


def _jpeg_that_claims(picture: Image.Image) -> bytes:
    data = bytearray(_saved("JPEG")(picture))
    frame = data.index(b"\xff\xc0") + 5  # after marker, length and precision
    data[frame : frame + 4] = b"\xff" * 4
    return bytes(data)


def _gif_that_claims(picture: Image.Image) -> bytes:
    data = bytearray(_saved("GIF")(picture.convert("P")))
    data[6:10] = b"\xff" * 4
    return bytes(data)


def _bmp_that_claims(picture: Image.Image) -> bytes:
    data = bytearray(_saved("BMP")(picture))
    data[18:26] = struct.pack("<ii", 1_000_000, 1_000_000)
    return bytes(data)


def _tiff_that_claims(picture: Image.Image) -> bytes:
    data = bytearray(_saved("TIFF")(picture))
    [start] = struct.unpack_from("<I", data, 4)
    for entry in range(start + 2, start + 2 + 12 * data[start], 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):  # width, height
            struct.pack_into("<HII", data, entry + 2, 4, 1, 1_000_000)
    return bytes(data)


BROKEN: Mapping[str, File] = {
    "empty": File(lambda picture: b"", "empty_image"),
    "one byte": File(lambda picture: b"\x89", "not_an_image"),
    "text": File(lambda picture: b"this is not a picture", "not_an_image"),
    "html": File(lambda picture: b"<!doctype html><html><body>404 not found</body></html>", "not_an_image"),
    "png header only": File(lambda picture: b"\x89PNG\r\n\x1a\n", "bad_image_header"),
    "jpeg cut at 10 %": File(_cut(0.1, "JPEG"), None),
    "jpeg cut at 90 %": File(_cut(0.9, "JPEG"), None),
    "png cut at 50 %": File(_cut(0.5, "PNG"), None),
    "jpeg with flipped bytes": File(_flipped("JPEG"), None),
    "png with flipped bytes": File(_flipped("PNG"), None),
    "webp with flipped bytes": File(_flipped("WEBP"), None),
    "one pixel": File(_resized(1, 1), "image_too_small"),
    "one pixel high": File(_resized(2000, 1), "image_too_small"),
    "one pixel wide": File(_resized(1, 2000), "image_too_small"),
    "7 pixels high": File(_resized(64, 7), "image_too_small"),
    "8 pixels high": File(_resized(64, 8)),
    "very wide": File(_resized(4000, 20), "image_too_elongated"),
    "50 times as wide as high": File(_resized(400, 8)),
    "50 times as high as wide": File(_resized(8, 400)),
    "100,000 pixels wide": File(_resized(100_000, 8), "image_too_elongated"),
    "all black": File(_one_color(0)),
    "all white": File(_one_color(255)),
    "noise": File(_noise),
    "grey": File(_as("L", "PNG")),
    "black and white": File(_as("1", "PNG")),
    "palette": File(_as("P", "PNG")),
    "transparent": File(_as("RGBA", "PNG")),
    "grey, transparent": File(_as("LA", "PNG")),
    "16 bit": File(_sixteen_bit),
    "floats that are not finite": File(_not_finite),
    "cmyk jpeg": File(_as("CMYK", "JPEG")),
    "turned by exif": File(_turned_by_exif),
    "progressive jpeg": File(_saved("JPEG", progressive=True)),
    "animated gif": File(_animated),
    "bmp": File(_saved("BMP")),
    "tiff": File(_saved("TIFF")),
    "webp": File(_saved("WEBP")),
    "49 megapixels": File(_whole_png(7000, 7000)),
    "51 megapixels": File(_whole_png(7200, 7100), "image_too_large"),
    "bomb: png of 40,000 x 40,000": File(_whole_png(40_000, 40_000), "image_too_large"),
    "bomb: png that claims 4 billion x 4 billion": File(
        lambda picture: _png(2**32 - 1, 2**32 - 1, _rows(64, 64)), "image_too_large"
    ),
    "bomb: jpeg that claims 65,535 x 65,535": File(_jpeg_that_claims, "image_too_large"),
    "bomb: gif that claims 65,535 x 65,535": File(_gif_that_claims, "image_too_large"),
    "bomb: bmp that claims a million x a million": File(_bmp_that_claims, "image_too_large"),
    "bomb: tiff that claims a million x a million": File(_tiff_that_claims, "image_too_large"),
    "bomb: png whose text inflates to 256 MiB": File(_png_with_text_bomb),
    "bomb: png of 64 x 64 whose rows inflate to 256 MiB": File(_png_that_goes_on),
}
