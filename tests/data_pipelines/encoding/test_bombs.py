"""Small files that would take much memory or time are refused by name; what only looks like them is read."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from data_pipelines.encoding.bombs import MAX_SCANS, scans
from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.errors import BadSample
from data_pipelines.records.image_header import MAX_PARTS, without_metadata

LIMITS = ImageLimits(max_pixels=1_000_000, min_side=1, max_aspect=200.0)
SIDE = 20_000  # of what the bombs hold: 400 MB where a pixel is a byte
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
ROOM = 150 << 20  # bytes that decoding all bombs may take


def saved(format: str, image: Image.Image = SMALL, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*sides: int) -> bytes:
    """A grey one with a header for each of ``sides``; the pixels are the last one's first rows."""
    heads = b"".join(chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) for side in sides)
    rows = zlib.compress(bytes((1 + sides[-1]) * min(sides[-1], 40)))
    return b"\x89PNG\r\n\x1a\n" + heads + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def ico(inner: bytes, side: int = 16) -> bytes:
    return struct.pack("<3H4B2H2I", 0, 1, 1, side % 256, side % 256, 0, 0, 1, 32, len(inner), 22) + inner


def dib(side: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(4096)


def gif(side: int, disposal: int = 2) -> bytes:
    """A screen of one pixel, and a frame beyond it."""
    frame = saved("GIF", Image.new("P", (side, side))) if side < 1000 else saved("GIF")
    at = frame.index(b"\x2c\0\0\0\0")
    extension = b"\x21\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
    head = frame[:6] + struct.pack("<HH", 1, 1) + frame[10 : 13 + (frame[10] >> 7) * (6 << (frame[10] & 7))]
    return head + extension + frame[at : at + 5] + struct.pack("<HH", side, side) + frame[at + 9 :]


def tiff(tile: int) -> bytes:
    """16 x 16 grey pixels, deflated, in one tile."""
    pixels = zlib.compress(bytes(min(tile, 64) ** 2))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(pixels)}
    start = 8 + len(pixels) + len(pixels) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", start) + pixels + bytes(len(pixels) % 2)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def jp2(side: int, boxed: bool = True) -> bytes:
    """A codestream of another size than the box in front of it says."""
    data = bytearray(saved("JPEG2000", no_jp2=not boxed))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", side, side)
    return bytes(data)


def patched(format: str, layout: str, *values: int, at: int) -> bytes:
    """With other numbers in its header."""
    data = bytearray(saved(format))
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    found = {
        "png": png(SIDE),
        "png, second header": png(16, SIDE),
        "png, third header": png(16, 16, SIDE),
        "ico of a png": ico(png(SIDE)),
        "ico of a png with two headers": ico(png(16, SIDE)),
        "ico of a bitmap": ico(dib(SIDE)),
        "gif, put back": gif(SIDE),
        "gif, as before": gif(SIDE, 3),
        "gif": gif(SIDE, 0),
        "gif, screen": patched("GIF", "<HH", SIDE, SIDE, at=6),
        "bmp": patched("BMP", "<ii", SIDE, SIDE, at=18),
        "ppm": b"P6 20000 20000 255\n" + bytes(900),
        "tga": patched("TGA", "<HH", SIDE, SIDE, at=12),
        "pcx": patched("PCX", "<HH", SIDE, SIDE, at=8),
        "tiff, tile": tiff(SIDE),
    }
    jpeg = saved("JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    found["jpeg"] = jpeg[:at] + struct.pack(">HH", SIDE, SIDE) + jpeg[at + 4 :]
    if features.check("jpg_2000"):
        found |= {"jp2": jp2(SIDE), "j2k": jp2(SIDE, boxed=False)}
    return found


def decode_all() -> None:
    """Prints each bomb's reason, with little memory left to take."""
    import resource

    files = bombs()
    decode(saved("PNG"), LIMITS)  # which loads all plugins
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    reasons = {}
    for name, data in files.items():
        try:
            decode(data, LIMITS)
        except BadSample as error:
            reasons[name] = error.reason
    print(json.dumps(reasons))


def test_bombs_are_too_large() -> None:
    """Each by name, in a process that could not hold any of them."""
    code = "from tests.data_pipelines.encoding.test_bombs import decode_all; decode_all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(bombs(), "image_too_large")


@pytest.mark.parametrize(
    "format", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX"]
)
def test_what_the_smallest_limit_allows_is_read(format: str) -> None:
    data = saved(format, sizes=[(16, 16)]) if format == "ICO" else saved(format)
    assert decode(data, ImageLimits(max_pixels=256)).shape == (16, 16, 3)
    with pytest.raises(BadSample, match="image_too_large"):
        decode(data, ImageLimits(max_pixels=255))


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (ico(saved("PNG", SMALL.resize((512, 512))), 256), (512, 512, 3)),
        (gif(40), (40, 40, 3)),
        (tiff(64), (16, 16, 3)),
        (saved("JPEG2000", no_jp2=True), (16, 16, 3)),
        (saved("GIF", SMALL.quantize(), save_all=True, append_images=[SMALL.resize((16, 16)).quantize()]), (16, 16, 3)),
    ],
    ids=["ico", "gif", "tiff", "j2k", "animated gif"],
)
def test_odd_files_are_read(data: bytes, shape: tuple[int, int, int]) -> None:
    assert decode(data, LIMITS).shape == shape


# ----------------------------------------------------------------------------------------------------------------------
# Scans
# ----------------------------------------------------------------------------------------------------------------------


def progressive(more: int, mode: str = "L", before: bytes = b"") -> bytes:
    """A JPEG whose last scan comes ``more`` times again."""
    data = saved("JPEG", Image.new(mode, (64, 64)), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:2] + before + data[2:-2] + last * more + data[-2:]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_scans_are_counted(mode: str) -> None:
    """In both decoders' files."""
    few = progressive(0, mode)
    usual = few.count(b"\xff\xda")
    assert 3 <= scans(few) == usual < 20
    assert scans(progressive(MAX_SCANS - usual, mode)) == MAX_SCANS
    with pytest.raises(BadSample) as error:
        decode(progressive(MAX_SCANS - usual + 1, mode), LIMITS)
    assert error.value.reason == "image_too_many_scans"
    comments, many = b"\xff\xfe\0\2" * 20_000, progressive(MAX_SCANS, mode)  # nobody has so many segments
    at = many.index(b"\xff\xda")
    with pytest.raises(BadSample, match="image_too_many_scans"):
        decode(many[:at] + comments + many[at:], LIMITS)
    with pytest.raises(BadSample, match="bad_image_header"):
        decode(many[:2] + comments + many[2:], LIMITS)


def test_what_is_no_scan_is_not_counted() -> None:
    """Bytes like a scan's in a comment, and after the end of the image, where phones put videos."""
    marks = b"\xff\xda" * 300
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(marks)) + marks
    plain = progressive(0)
    for data in (progressive(0, before=comment), plain + marks, plain[:-2] + b"\xff\xff\xff\xd9" + marks):
        assert scans(data) == scans(plain)
        np.testing.assert_array_equal(decode(data, LIMITS), decode(plain, LIMITS))


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a file
# ----------------------------------------------------------------------------------------------------------------------

TRANSPARENT = SMALL.quantize(16)
TRANSPARENT.info["transparency"] = 3
BEGINNINGS = {"PNG": (b"IDAT", 4), "GIF": (b"\x21\xf9\x04", 0)}  # of pixels: a mark, and the bytes before it
PARTS = {
    "private chunks": ("PNG", chunk(b"prVt", b"")),
    "frames of an animation": ("PNG", chunk(b"fdAT", bytes(8))),
    "damaged chunks": ("PNG", chunk(b"gAMA", b"1234")[:-1] + b"!"),
    "extensions": ("GIF", b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"),
    "comments": ("GIF", b"\x21\xfe\x01a\0"),
    "stray bytes": ("GIF", b"\x01"),
}


def inserted(format: str, parts: bytes) -> bytes:
    data, (mark, before) = saved(format, TRANSPARENT), BEGINNINGS[format]
    at = data.index(mark) - before
    return data[:at] + parts + data[at:]


@pytest.mark.parametrize("name", PARTS)
def test_parts_without_pixels_are_dropped_and_bounded(name: str) -> None:
    """Each costs Pillow time, and comments of a GIF their number squared."""
    format, part = PARTS[name]
    plain, many = inserted(format, b""), inserted(format, part * (MAX_PARTS // 8))
    assert len(without_metadata(many)) <= len(plain)
    np.testing.assert_array_equal(decode(many, LIMITS), decode(plain, LIMITS))
    assert (decode(plain, LIMITS) == 255).all(-1).any()  # transparent
    with pytest.raises(BadSample, match=r"bad_image_header.*more than"):
        decode(inserted(format, part * MAX_PARTS), LIMITS)


def test_files_of_many_parts_are_read() -> None:
    """Pixels in short chunks, a large profile, and an animation of more blocks than may come before its first frame."""
    rows = zlib.compress(bytes(900 * 901), 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 900, 900, 8, 0, 0, 0, 0))
    chunks = [chunk(b"IDAT", rows[at : at + 16]) for at in range(0, len(rows), 16)]
    assert 50_000 < len(chunks) < MAX_PARTS
    assert decode(b"".join([head, *chunks, chunk(b"IEND", b"")]), LIMITS).shape == (900, 900, 3)
    profile = b"\x21\xff\x0bICCRGBG1012" + (b"\xff" + bytes(255)) * 20_000 + b"\0"
    image = inserted("GIF", profile)
    later = image[image.index(b"\x21\xf9\x04") : -1] * MAX_PARTS
    assert decode(image[:-1] + later + b";", LIMITS).shape == (16, 16, 3)
