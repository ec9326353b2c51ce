"""Format, size and orientation of an encoded image, from its header, without decoding it."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import re
import struct
import warnings

from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats

_ORIENTATION = 0x0112
# Start-of-frame markers: all of C0..CF but DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # of a JPEG's segment: not within a scan's data
MAX_IMAGE_BYTES = 1 << 28  # a longer "image" is not even read into memory; training has limits of its own
_TEXT_CHUNKS = frozenset([b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
_PNG, _ICO = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0"
# Formats that Pillow may open. Left out are those that start other programs (EPS) or draw (WMF), and rarities.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
# Faults of images are counted and listed; without this, Pillow would also print some of them.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What a header says.

    Attributes:
      format: "jpeg", "png", or Pillow's name of the format in lower case.
      width, height: pixels as stored.
      orientation: EXIF value 1..8; 5..8 swap width and height when the image is turned upright.
    """

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def check_length(length: int) -> None:
    """Raises BadSample "image_too_many_bytes" for what should not be read at all."""
    if length > MAX_IMAGE_BYTES:
        raise BadSample("image_too_many_bytes", detail=f"{length} bytes")


def read_header(data: bytes) -> ImageHeader:
    """The header of an encoded image (the whole file; only its first part is looked at where that suffices).

    Raises BadSample: "empty_image" (no bytes), "not_an_image" (HTML, text, unknown format), "bad_image_header",
    "image_too_large" (beyond what Pillow opens), "unread_heic" and its like (see ``extra_formats``).
    """
    if not data:
        raise BadSample("empty_image", detail="0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        header = _jpeg(data)
    elif data[:8] == _PNG:
        header = _png(data)
    elif data[:4] == _ICO:
        header = _ico(data)
    elif kind := extra_formats.kind_of(data):
        header = _extra(kind, data)
    else:
        header = _other(data)
    if header.width <= 0 or header.height <= 0:
        raise BadSample("bad_image_header", detail=f"size {header.width}x{header.height}")
    return header


def _jpeg(data: bytes) -> ImageHeader:
    position, end, orientation = 2, len(data), 1
    while position + 4 <= end:
        if data[position] != 0xFF:
            # Stray bytes between segments: decoders skip to the next marker.
            position = data.find(b"\xff", position)
            if position < 0:
                break
            continue
        marker = data[position + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without a length
            position += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):  # end of image or start of scan before any frame header
            break
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _START_OF_FRAME:
            if position + 9 > end:
                break
            height, width = struct.unpack_from(">HH", data, position + 5)
            return ImageHeader("jpeg", width, height, orientation)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0" and orientation == 1:
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + max(length, 2)
    raise BadSample("bad_image_header", detail="JPEG without a frame header")


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether a JPEG has more than ``most`` scans, each of which passes over the whole image."""
    if data.count(b"\xff\xda") <= most:  # those in thumbnails included: quick, and enough for nearly all
        return False
    position, scans = 2, 0
    while scans <= most and (found := _MARKER.search(data, position)):
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:  # what comes after the end is no part of the image
            break
        if marker not in (0x01, 0xD8):  # without a length
            position += max(int.from_bytes(data[position : position + 2]), 2)
        scans += marker == 0xDA
    return scans > most


def _png(data: bytes) -> ImageHeader:
    if len(data) < 24 or data[12:16] != b"IHDR":
        raise BadSample("bad_image_header", detail="PNG without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    position, orientation = 8, 1
    while position + 8 <= len(data):  # chunks are skipped; eXIf may come before or after the pixels
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
            break
        if kind == b"IEND":
            break
        position += 12 + length
    return ImageHeader("png", width, height, orientation)


def _ico(data: bytes) -> ImageHeader:
    """Of that picture of an icon which Pillow takes, as the picture itself says: opening an icon would decode it."""
    from PIL.IcoImagePlugin import IcoFile

    try:
        inner = data[IcoFile(io.BytesIO(data)).entry[0].offset :]
        if inner[:8] == _PNG:
            return dataclasses.replace(_png(inner), format="ico", orientation=1)
        (length,) = struct.unpack_from("<I", inner)
        width, height = struct.unpack_from("<HH" if length == 12 else "<ii", inner, 4)
    except (IndexError, struct.error) as error:
        raise BadSample("bad_image_header", detail=f"ICO: {error}") from None
    return ImageHeader("ico", width, abs(height) // 2)  # a bitmap and its mask


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which say nothing about its pixels; anything else as it is.

    Pillow inflates them, and refuses the whole image where one is larger than its own limit, or damaged.
    """
    if data[:8] != _PNG:
        return data
    position, kept, start = 8, [], 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in _TEXT_CHUNKS:
            kept.append(data[start:position])
            start = position + 12 + length
        position += 12 + length
        if kind == b"IEND":
            break
    return b"".join([*kept, data[start:]]) if kept else data


def _exif_orientation(tiff: bytes) -> int:
    """Orientation tag of a TIFF structure's first directory; 1 if absent or broken."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _ = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == _ORIENTATION:
                value = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)[0]
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


@functools.lru_cache
def formats(more: str = "") -> tuple[str, ...]:
    """Those of ``FORMATS`` that this build of Pillow has, and ``more``."""
    from PIL import Image

    Image.init()
    return tuple(name for name in (*FORMATS, more) if name in Image.OPEN)


def _extra(kind: str, data: bytes) -> ImageHeader:
    """Of one of ``extra_formats``."""
    extra_formats.need(kind)
    if kind == "svg":
        return dataclasses.replace(_png(extra_formats.draw(data)), format="svg")
    return ImageHeader("jxl", *extra_formats.jxl_size(data)) if kind == "jxl" else _other(data, "HEIF")


def _other(data: bytes, more: str = "") -> ImageHeader:
    """GIF, WebP, BMP, TIFF ... by Pillow, which opens lazily (no pixels are decoded)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged by whoever decodes
            Image.MAX_IMAGE_PIXELS = None  # the limit is that of the config
            with Image.open(io.BytesIO(data), formats=formats(more)) as image:
                width, height = image.size
                if image.format == "TIFF":  # whose size Pillow gives upright
                    width, height = image.tag_v2[256], image.tag_v2[257]
                # HEIF's own mark of orientation has been obeyed; EXIF only repeats it.
                orientation = 1 if image.format == "HEIF" else image.getexif().get(_ORIENTATION, 1)
                name = (image.format or "unknown").lower()
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", detail=str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadSample("not_an_image", detail=f"starts with {bytes(data[:16])!r}") from None
    except Exception as error:  # Pillow's plugins raise many kinds: OSError, ValueError, SyntaxError, struct.error, ...
        raise BadSample("bad_image_header", detail=f"{type(error).__name__}: {error}") from None
    return ImageHeader(name, width, height, orientation if orientation in range(1, 9) else 1)
