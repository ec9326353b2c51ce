"""Formats that Pillow cannot read by itself: HEIC, JPEG XL and SVG (packages of the extra ``images``), and video.

Without these packages such a sample is bad for a specific reason: "unread_heic", "unread_jxl", "unread_svg",
"unread_video".
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from data_pipelines.errors import BadSample

_PACKAGES = {"heic": "pillow_heif", "jxl": "pillow_jxl", "svg": "resvg_py", "video": "av"}
# The major brands of HEIF files in HEVC; "mif1" and "msf1" also occur in AVIF, which Pillow reads.
_HEIC = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"])
_JXL, _JXL_BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
# Atomic: without <svg after them, the comments must not be divided differently, in exponentially many ways.
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?>(?:(?:<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE[^>\[]*(?:\[.*?\]\s*)?>)\s*)*)<(?:\w+:)?svg\b",
    re.S,
)
_SVG_HEAD = 1 << 16  # bytes within which <svg must begin
# Up to the next "<", which no attribute contains; one may contain ">".
_SVG_LINK = re.compile(
    rb"<(?:\w+:)?(?:image|feImage|use)\b[^<]*?\bhref\s*=\s*[\"'](?!\s*#|\s*data:)([^\"']{0,80})", re.S
)
SVG_SIDE = 896  # pixels of a drawing's longer side; vector drawings have no resolution
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height, by number from 1


def kind_of(data: bytes) -> str:
    """ "heic", "jxl" or "svg" for an encoded image in one of these formats, "" for others."""
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, length, 4))}
        return "heic" if data[8:12] in _HEIC or (b"avif" not in brands and _HEIC & brands) else ""
    if data[:2] == _JXL or data[:12] == _JXL_BOXES:
        return "jxl"
    return "svg" if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<" and _SVG.match(data[:_SVG_HEAD]) else ""


@functools.cache
def _package(kind: str) -> Any:
    """The package that reads a kind, registered with Pillow if it is a plugin; None if it is not installed."""
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        return None
    package = importlib.import_module(_PACKAGES[kind])
    if kind == "heic":
        package.register_heif_opener()
    return package


def need(kind: str, found: str = "") -> Any:
    """The package for a kind. If it is missing, raises BadSample "unread_<kind>", which also reports ``found``."""
    if (package := _package(kind)) is None:
        name, extra = _PACKAGES[kind].replace("_", "-"), "video" if kind == "video" else "images"
        advice = f"{kind.upper()} needs {name}: pip install -e '.[{extra}]'"
        raise BadSample(f"unread_{kind}", detail=f"{found}; {advice}" if found else advice)
    return package


def refuse_video(found: str) -> NoReturn:
    """Raises BadSample for a video where none is expected; without the package, for the reason that it is missing."""
    need("video", found)
    raise BadSample("unexpected_video", detail=found)


def now_readable(reasons: Iterable[str]) -> bool:
    """Whether one of the ``reasons`` in an index was a missing package that is now installed."""
    kinds = (reason.removeprefix("unread_") for reason in reasons)
    return any(_package(kind) is not None for kind in kinds if kind in _PACKAGES)


def draw(data: bytes) -> bytes:
    """An SVG as PNG, its longer side ``SVG_SIDE`` pixels. Text is set in DejaVu Sans, so that all hosts draw the same.

    Raises BadSample "unread_svg", "corrupt_image", or "svg_names_files" if it refers to content outside the file.
    """
    package = need("svg")
    if found := _SVG_LINK.search(data):
        raise BadSample("svg_names_files", detail=f"refers to {found.group(1).decode('utf-8', 'replace')!r}")
    families = ("font_family", "serif_family", "sans_serif_family", "cursive_family", "fantasy_family")
    fonts = dict.fromkeys((*families, "monospace_family"), "DejaVu Sans")
    try:
        png = package.svg_to_bytes(
            svg_string=data.decode("utf-8-sig"),
            width=SVG_SIDE,
            height=SVG_SIDE,
            skip_system_fonts=True,
            font_files=_fonts(),
            **fonts,
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadSample("corrupt_image", detail=f"SVG: {error}"[:200]) from None
    return bytes(png)


@functools.cache
def _fonts() -> list[str]:
    """The fonts that come with matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data/fonts/ttf"
    return [str(folder / f"DejaVuSans{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")]


def jxl_size(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation) of a JPEG XL file from its header: ISO/IEC 18181-1, SizeHeader and ImageMetadata.

    The size is as stored, before the orientation (1..8 as in EXIF) is applied. Raises BadSample "bad_image_header".
    """
    head = _codestream(data, 22)
    if head[:2] != _JXL:
        raise BadSample("bad_image_header", detail="JPEG XL without a codestream")
    bits, place = int.from_bytes(head[2:], "little"), itertools.count()

    def take(count: int) -> int:
        return sum((bits >> next(place) & 1) << n for n in range(count))

    def side(small: int) -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height, ratio = side(small), take(3)
    width = height * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side(small)
    orientation = 1
    if not take(1) and take(1):  # not all defaults, and extra fields
        orientation = take(3) + 1
    return width, height, orientation


def _codestream(data: bytes, count: int) -> bytes:
    """The first bytes of the codestream, which a container holds in one box or in parts of any size."""
    if data[:2] == _JXL:
        return data[:count]
    at, start = 0, b""
    while at + 8 <= len(data) and len(start) < count:
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 16 if size == 1 else 8
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size or len(data) - at
        if size < head:
            break
        if kind in (b"jxlc", b"jxlp"):
            first = at + head + 4 * (kind == b"jxlp")
            start += data[first : min(at + size, first + count - len(start))]
        at += size
    return start
