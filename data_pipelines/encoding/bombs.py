"""What small files make decoders do, beyond what their headers say: found before they are decoded."""

from __future__ import annotations

import struct

from PIL import Image

from data_pipelines.records.image_header import MARKER, MAX_SEGMENTS

MAX_SCANS = 100  # of a JPEG; progressive ones of usual encoders have about 10
_SCAN = b"\xff\xda"
_CODESTREAM = b"\xff\x4f\xff\x51"  # the begin of JPEG 2000's, and its size


def scans(data: bytes) -> int:
    """Scans of a JPEG, or more than there are if they are few. Each costs a pass over all blocks of the image."""
    if (count := data.count(_SCAN)) <= MAX_SCANS:
        return count  # of thumbnails, too, and of what follows the image
    count, place = 0, 2
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, place)
        if marker is None or marker.group() == b"\xff\xd9" or count > MAX_SCANS:
            break
        count += marker.group() == _SCAN
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    else:
        return MAX_SCANS + 1  # nobody knows
    return count


def inner_sizes(image: Image.Image, data: bytes) -> list[tuple[int, int]]:
    """Of what Pillow will hold in memory to load ``image`` of the file ``data``, where that may be more than its size.

    PNG, GIF and ICO are judged by ``read_header``, before they are opened.
    """
    if image.format == "TIFF":  # whose tiles may be larger than the image
        sides = image.tag_v2.get(322), image.tag_v2.get(323)
        return [sides] if all(isinstance(side, int) for side in sides) else []
    if image.format == "JPEG2000":
        return _codestream_sizes(data)
    return []


def _codestream_sizes(data: bytes) -> list[tuple[int, int]]:
    """What the codestream of a JPEG 2000 says, whose boxes may say something else."""
    start = 0 if data.startswith(_CODESTREAM) else _box(data, b"jp2c")
    if data[start : start + 4] != _CODESTREAM:
        return []
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    return [(right - left, bottom - top)]


def _box(data: bytes, wanted: bytes) -> int:
    """Where the content of the first box of that kind begins; the end of the file if there is none."""
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
