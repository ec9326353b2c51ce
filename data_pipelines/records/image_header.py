"""Format, size and orientation of an encoded image, from its header, without decoding it."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging
import re
import struct
import warnings
from collections.abc import Iterator

from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats

_ORIENTATION = 0x0112
# Start-of-frame markers: all of C0..CF except DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# A JPEG marker with a length, or the end marker: not a stuffed zero, a fill byte, or a restart marker.
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.S)
MAX_SEGMENTS = 10_000  # of a JPEG; a 16 MB colour profile has 255
# Chunks of a PNG, or blocks before the first frame of a GIF. A PNG of 50 MB has 6,400 chunks from libpng.
MAX_PARTS = 1 << 16
MAX_IMAGE_BYTES = 1 << 28  # a longer "image" is not even read into memory; training has its own limits
_PNG = b"\x89PNG\r\n\x1a\n"
_GIF = (b"GIF87a", b"GIF89a")
_EXTENSION, _FRAME, _TRAILER = 0x21, 0x2C, 0x3B  # first bytes of a GIF's sections
_CONTROL_EXTENSION = b"\x21\xf9"  # holds the transparent colour
# Formats that Pillow may open. Left out are those that start other programs (EPS) or draw (WMF), and rare ones.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
# Image errors are counted and listed; without this, Pillow would also print some of them.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """The content of a header.

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
    """Raises BadSample "image_too_many_bytes" for data that should not be read at all."""
    if length > MAX_IMAGE_BYTES:
        raise BadSample("image_too_many_bytes", detail=f"{length} bytes")


def read_header(data: bytes) -> ImageHeader:
    """The header of an encoded image (the whole file, of which only the first part is examined if that is sufficient).

    Raises BadSample: "empty_image" (no bytes), "not_an_image" (HTML, text, unknown format), "bad_image_header",
    "image_too_large" (beyond what Pillow opens), "unread_heic" and similar reasons (see ``extra_formats``).
    """
    if not data:
        raise BadSample("empty_image", detail="0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        header = _jpeg(data)
    elif data[:8] == _PNG:
        header = _png(data)
    elif data[:6] in _GIF:
        header = _gif(data)
    elif data[:4] == b"\0\0\1\0":
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
    for _ in range(MAX_SEGMENTS):
        # Stray bytes between segments: decoders skip to the next marker.
        found = MARKER.search(data, position)
        if found is None or (position := found.start()) + 4 > end:
            break
        marker = data[position + 1]
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


def _png(data: bytes) -> ImageHeader:
    if len(data) < 24 or data[12:16] != b"IHDR":
        raise BadSample("bad_image_header", detail="PNG without IHDR")
    orientation, width, height, has_pixels = 0, 0, 0, False
    for position, length, kind in _chunks(data):  # eXIf may come before or after the pixels
        if kind == b"IHDR" and not has_pixels and position + 16 <= len(data):  # Pillow uses the last one
            width, height = struct.unpack_from(">II", data, position + 8)
        elif kind == b"eXIf":
            orientation = orientation or _exif_orientation(data[position + 8 : position + 8 + length])
        has_pixels |= kind == b"IDAT"
        if has_pixels and orientation:
            break
    return ImageHeader("png", width, height, orientation or 1)


def _chunks(png: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(position, length of the content, kind) of each chunk up to IEND. Raises BadSample "bad_image_header"."""
    position = len(_PNG)
    for _ in range(MAX_PARTS):
        if position + 8 > len(png):
            return
        length, kind = struct.unpack_from(">I4s", png, position)
        yield position, length, kind
        if kind == b"IEND":
            return
        position += 12 + length
    raise BadSample("bad_image_header", detail=f"PNG of more than {MAX_PARTS} chunks")


def _gif(data: bytes) -> ImageHeader:
    """The logical screen, extended by the first frame. (On opening, Pillow would allocate a frame of any size.)"""
    if len(data) < 13:
        raise BadSample("bad_image_header", detail="GIF without a screen")
    width, height = struct.unpack_from("<HH", data, 6)
    for position, kind in _sections(data):
        if kind == _FRAME and position + 10 <= len(data):
            left, top, across, down = struct.unpack_from("<4H", data, position + 1)
            return ImageHeader("gif", max(width, left + across), max(height, top + down))
    raise BadSample("bad_image_header", detail="GIF without a frame")


def _sections(gif: bytes) -> Iterator[tuple[int, int]]:
    """(position, kind) of extensions and stray bytes up to the first frame, and of the frame.

    Raises BadSample "bad_image_header".
    """
    flags, in_extension = gif[10], False
    position = 13 + (flags >> 7) * (6 << (flags & 7))
    for _ in range(MAX_PARTS):
        if position >= len(gif):
            return
        kind = gif[position]
        if in_extension:  # a block, which begins with its length; an empty one is the last
            in_extension, position = kind > 0, position + 1 + kind
            continue
        yield position, kind
        if kind in (_FRAME, _TRAILER):
            return
        in_extension = kind == _EXTENSION
        position += 1 + in_extension  # an extension's label
    raise BadSample("bad_image_header", detail=f"GIF of more than {MAX_PARTS} blocks before its first frame")


def _ico(data: bytes) -> ImageHeader:
    """The largest picture, from its own header, not the directory. (Pillow would decode it on opening the icon.)"""

    def rank(entry: tuple[int, ...]) -> tuple[int, int]:
        width, height, colors, _, _, depth, _, _ = entry
        return -(width or 256) * (height or 256), depth or (colors and (colors - 1).bit_length()) or 256

    try:
        (count,) = struct.unpack_from("<H", data, 4)
        entries = [struct.unpack_from("<4B2H2I", data, 6 + 16 * number) for number in range(count)]
        inner = data[min(entries, key=rank)[-1] :]
        if inner[:8] == _PNG:
            return dataclasses.replace(_png(inner), format="ico", orientation=1)
        small = inner[:4] == b"\x0c\0\0\0"
        width, height = struct.unpack_from("<HH" if small else "<Ii", inner, 4)
    except (struct.error, ValueError):
        raise BadSample("bad_image_header", detail="ICO without a picture") from None
    return ImageHeader("ico", width, abs(height) // 2)  # the height includes an equally high mask


def without_metadata(data: bytes) -> bytes:
    """A PNG or GIF without what does not affect the pixels of its first frame; anything else unchanged.

    Pillow reads each text, profile and comment in Python, some in quadratic time, inflates those of a PNG, and rejects
    the whole image if one is damaged or larger than Pillow's limit. Raises BadSample "bad_image_header".
    """
    if data[:8] == _PNG:
        return _png_without_metadata(data)
    return _gif_without_metadata(data) if data[:6] in _GIF else data


def _png_without_metadata(data: bytes) -> bytes:
    kept, start = [], 0
    for position, length, kind in _chunks(data):
        is_optional = kind.isalpha() and kind[:1].islower()  # by the format's rule for names
        if is_optional and kind != b"tRNS":  # the transparent colours
            kept.append(data[start:position])
            start = position + 12 + length
    return b"".join([*kept, data[start:]]) if kept else data


def _gif_without_metadata(data: bytes) -> bytes:
    positions = [position for position, _ in _sections(data)]
    spans = itertools.pairwise(positions)
    controls = [data[start:end] for start, end in spans if data[start : start + 2] == _CONTROL_EXTENSION]
    return b"".join([data[: positions[0]], *controls, data[positions[-1] :]])


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
    """Those of ``FORMATS`` that this build of Pillow supports, and ``more``."""
    from PIL import Image

    Image.init()
    return tuple(name for name in (*FORMATS, more) if name in Image.OPEN)


def _extra(kind: str, data: bytes) -> ImageHeader:
    """The header of an image in one of ``extra_formats``."""
    extra_formats.need(kind)
    if kind == "svg":
        return dataclasses.replace(_png(extra_formats.draw(data)), format="svg")
    return ImageHeader("jxl", *extra_formats.jxl_size(data)) if kind == "jxl" else _other(data, "HEIF")


def _other(data: bytes, more: str = "") -> ImageHeader:
    """GIF, WebP, BMP, TIFF ... via Pillow, which opens lazily (no pixels are decoded)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked when decoding
            Image.MAX_IMAGE_PIXELS = None  # the limit of the config applies
            with Image.open(io.BytesIO(data), formats=formats(more)) as image:
                width, height = image.size
                if image.format == "TIFF":  # Pillow reports its upright size
                    width, height = image.tag_v2[256], image.tag_v2[257]
                # HEIF's own orientation has been applied; EXIF only repeats it.
                orientation = 1 if image.format == "HEIF" else image.getexif().get(_ORIENTATION, 1)
                name = (image.format or "unknown").lower()
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", detail=str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadSample("not_an_image", detail=f"starts with {bytes(data[:16])!r}") from None
    except Exception as error:  # Pillow's plugins raise many types: OSError, ValueError, SyntaxError, struct.error, ...
        raise BadSample("bad_image_header", detail=f"{type(error).__name__}: {error}") from None
    return ImageHeader(name, width, height, orientation if orientation in range(1, 9) else 1)
