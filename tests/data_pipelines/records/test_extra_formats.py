"""HEIC, JPEG XL and SVG: with their packages decoded, without them a reason that names the package."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats
from data_pipelines.records.image_header import read_header
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, write_tar

LIMITS = ImageLimits()
# Beginnings of real files.
HEADS = {
    "heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf",
    "jxl": b"\xff\x0a\x07\x13\x88\x02",
    "svg": b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}
OTHERS = [
    encoded(),
    encoded(format="PNG"),
    encoded(format="AVIF"),
    encoded(format="GIF"),
    b"<html><svg/></html>",
    b"<?xml version='1.0'?><rss/>",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifheic",
    b"\0\0\0\x18ftypisom\0\0\0\0isom",
    b"",
]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extra_formats, "_package", lambda kind: None)
    yield


def smooth(width: int, height: int) -> Image.Image:
    """A picture of which no turned or mirrored form is like another, and that lossy codecs keep."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype(np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", HEADS)
def test_kinds_and_reasons(kind: str, nothing_installed: None) -> None:
    assert extra_formats.kind_of(HEADS[kind]) == kind
    with pytest.raises(BadSample, match=f"unread_{kind}.*pip install"):
        read_header(HEADS[kind])


def test_kinds_of_others() -> None:
    assert [extra_formats.kind_of(data) for data in OTHERS] == [""] * len(OTHERS)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = smooth(64, 40)
    data = saved(stored, "HEIF", quality=95, exif=exif.tobytes())
    upright = stored.rotate({1: 0, 3: 180, 6: -90}[orientation], expand=True)
    assert read_header(data).size == upright.size
    assert np.abs(decode(data, LIMITS).astype(int) - np.asarray(upright)).mean() < 4


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("from_jpeg", [False, True])
def test_jxl(orientation: int, from_jpeg: bool, tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = smooth(64, 40)
    if from_jpeg:  # recompressed without loss: a JPEG again on loading
        path = tmp_path / "a.jpg"
        stored.save(path, quality=95, exif=exif)
        data = saved(Image.open(path), "JXL", lossless_jpeg=True)
    else:
        data = saved(stored, "JXL", lossless=True)
    upright = stored.rotate({1: 0, 3: 180, 6: -90}[orientation] if from_jpeg else 0, expand=True)
    assert read_header(data).size == upright.size
    assert np.abs(decode(data, LIMITS).astype(int) - np.asarray(upright)).mean() < 4


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 1200), height=st.integers(1, 1200))
def test_jxl_size(width: int, height: int) -> None:
    pytest.importorskip("pillow_jxl")
    data = saved(Image.new("RGB", (width, height)), "JXL", effort=1)
    assert extra_formats.jxl_size(data) == (width, height, 1)
    assert extra_formats.jxl_size(saved(Image.new("RGB", (width, height)), "JXL", effort=1, use_container=True))[
        :2
    ] == (width, height)


@pytest.mark.parametrize("first", [0, 1, 3, 30])
def test_jxl_in_parts(first: int) -> None:
    """A container may break its stream anywhere: also in the size."""
    pytest.importorskip("pillow_jxl")
    stream = saved(smooth(700, 300), "JXL", effort=1)

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    parts = box(b"jxlp", bytes(4) + stream[:first]) + box(b"jxlp", b"\x80\0\0\1" + stream[first:])
    start = b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl ")
    assert read_header(start + parts).size == (700, 300)
    np.testing.assert_array_equal(decode(start + parts, LIMITS), decode(stream, LIMITS))


def test_svg() -> None:
    pytest.importorskip("resvg_py")
    shape = '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="12">{}</svg>'
    shape = shape.format('<rect width="12" height="12" fill="red"/>{}')
    pixels = decode(shape.format("").encode(), LIMITS)
    assert pixels.shape == (448, 896, 3) and read_header(shape.format("").encode()).size == (896, 448)
    assert (pixels[:, :440] == (255, 0, 0)).all() and (pixels[:, 456:] == 255).all()
    text = decode(shape.format('<text x="13" y="10" font-size="8" font-family="Arial">ab</text>').encode(), LIMITS)
    assert (text[:, 456:] < 128).any()
    links = ('<image href="/etc/x.png"/>', "<image xlink:href='http://a.b/x.png'/>", '<use href="other.svg#a"/>')
    for link in (*links, '<image id=">" href="/etc/x.png"/>'):
        with pytest.raises(BadSample, match="svg_names_files"):
            decode(shape.format(link).encode(), LIMITS)
    for broken in (b"<svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="0"/>', b"<svg>\xff</svg>"):
        with pytest.raises(BadSample, match="corrupt_image"):
            read_header(broken)


def test_index_after_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that only lacked a package are found once it is there."""
    package = pytest.importorskip("resvg_py")
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="12"/>'
    tar = write_tar(tmp_path / "a.tar", [("a.svg", drawing), ("a.txt", b"x"), ("b.jpg", encoded()), ("b.txt", b"y")])
    monkeypatch.setattr(extra_formats, "_package", lambda kind: None)
    assert len(open_source({"kind": "tar", "paths": str(tar)})) == 1
    assert len(open_source({"kind": "tar", "paths": str(tar)})) == 1
    monkeypatch.setattr(extra_formats, "_package", lambda kind: package)
    assert len(open_source({"kind": "tar", "paths": str(tar)})) == 2


MEDIA = [("mp4", "unread_video"), ("WEBM", "unread_video"), ("wav", "unread_audio"), ("mp3", "unread_audio")]


@pytest.mark.usefixtures("no_pyav")
@pytest.mark.parametrize("extension,reason", MEDIA)
@pytest.mark.parametrize("others", [("txt",), ("json",), ("jpg", "txt"), ("jpg", "json"), ()])
def test_media_beside(extension: str, reason: str, others: tuple[str, ...], tmp_path: Path) -> None:
    """Nothing is trained on without the video or sound that belongs to it, whatever else does."""
    talk = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]}
    held = {"txt": b"words", "json": json.dumps(talk).encode(), "jpg": encoded()}
    members = [(f"a.{extension}", b"\0" * 9), *((f"a.{other}", held[other]) for other in others)]
    tar = write_tar(tmp_path / "a.tar", [*members, ("b.jpg", encoded()), ("b.txt", b"y"), ("README", b"read")])
    folder = tmp_path / "a"
    folder.mkdir()
    for name, data in [*members, ("b.jpg", encoded()), ("b.txt", b"y"), ("README", b"read")]:
        (folder / name).write_bytes(data)
    for kind, path in (("tar", tar), ("files", folder)):
        source = open_source({"kind": kind, "paths": str(path)})
        assert (len(source), source.dropped()) == (1, {reason: 1})
