"""Decompression bombs: small files that cost a decoder more than their headers say, detected before decoding."""

from __future__ import annotations

import struct

from PIL import Image

from data_pipelines.records.image_header import MARKER, MAX_SEGMENTS

MAX_SCANS = 100  # of a JPEG; progressive files from common encoders have about 10
_SCAN = b"\xff\xda"
_CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream, and its size marker


def scans(data: bytes) -> int:
    """Scans of a JPEG; possibly an overcount where they are few. Each costs a pass over all blocks of the image."""
    if (count := data.count(_SCAN)) <= MAX_SCANS:
        return count  # includes those of thumbnails and of data after the image
    count, place = 0, 2
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, place)
        if marker is None or marker.group() == b"\xff\xd9" or count > MAX_SCANS:
            break
        count += marker.group() == _SCAN
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    else:
        return MAX_SCANS + 1  # the number is unknown
    return count


def inner_sizes(image: Image.Image, data: bytes) -> list[tuple[int, int]]:
    """Sizes that Pillow will hold in memory to load ``image`` from ``data``, where these may exceed the image's size.

    PNG, GIF and ICO are checked by ``read_header``, before they are opened.
    """
    if image.format == "TIFF":  # its tiles may be larger than the image
        sides = image.tag_v2.get(322), image.tag_v2.get(323)
        return [sides] if all(isinstance(side, int) for side in sides) else []
    if image.format == "JPEG2000":
        return _codestream_sizes(data)
    return []


def _codestream_sizes(data: bytes) -> list[tuple[int, int]]:
    """The size in the codestream of a JPEG 2000; its boxes may say something else."""
    start = 0 if data.startswith(_CODESTREAM) else _box(data, b"jp2c")
    if data[start : start + 4] != _CODESTREAM:
        return []
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    return [(right - left, bottom - top)]


def _box(data: bytes, wanted: bytes) -> int:
    """Offset of the content of the first box of that kind; the end of the file if there is none."""
    place = 0
    while place + 16 <= len(data):
        size, kind, large = struct.unpack_from(">I4sQ", data, place)
        head, size = (16, large) if size == 1 else (8, size)
        if kind == wanted:
            return place + head
        if size < head:  # 0 = to the end of the file
            break
        place += size
    return len(data)
