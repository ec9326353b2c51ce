"""Images that decoders refuse for what does not matter, and the limits that reasons name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_pipelines.encoding.decoding import MOST_SCANS, ImageLimits, decode
from data_pipelines.errors import BadSample
from data_pipelines.records.image_header import has_more_scans
from tests.data_pipelines.shard_tools import encoded


@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_without_its_end_mark_is_whole(cut):
    data = encoded(200, 150)
    np.testing.assert_array_equal(decode(data[:-cut], ImageLimits()), decode(data, ImageLimits()))


@pytest.mark.parametrize("cut", [3, 50, 2000])
def test_a_jpeg_that_lacks_more_is_truncated(cut):
    with pytest.raises(BadSample, match="truncated_image"):
        decode(encoded(200, 150)[:-cut], ImageLimits())


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_can_be_decoded_as_far_as_it_goes(progressive, monkeypatch):
    """As Pillow does with its own switch."""
    buffer, limits = io.BytesIO(), ImageLimits(truncated_jpegs=True)
    Image.fromarray(decode(encoded(200, 160), ImageLimits())).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    for share in (0.4, 0.6):  # between the headers of scans
        cut = data[: int(share * len(data))]
        with monkeypatch.context() as patch, Image.open(io.BytesIO(cut)) as image:
            patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
            np.testing.assert_array_equal(decode(cut, limits), np.asarray(image))
        with pytest.raises(BadSample, match="truncated_image"):
            decode(cut, ImageLimits())
    np.testing.assert_array_equal(decode(data, limits), decode(data, ImageLimits()))
    for broken in (encoded(200, 150, "PNG")[:-2000], data[:30], b"\xff\xd8\xff" + bytes(200)):
        with pytest.raises(BadSample):
            decode(broken, limits)


@pytest.mark.parametrize("tail", [b"\0" * 1000, b"\xff\xd9", b"\0\0\0\x18ftypmp42"])
def test_what_follows_a_jpeg_does_not_matter(tail):
    data = encoded(200, 150)
    np.testing.assert_array_equal(decode(data + tail, ImageLimits()), decode(data, ImageLimits()))


def test_zeros_instead_of_the_end_mark():
    """As files have them whose room was reserved before they were written."""
    data = encoded(200, 150)
    np.testing.assert_array_equal(decode(data[:-2] + bytes(3000), ImageLimits()), decode(data, ImageLimits()))
    with pytest.raises(BadSample, match="truncated_image"):
        decode(data[:-200] + bytes(3000), ImageLimits())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"key\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"iTXt", b"key\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"tEXt", b"key\0" + b"x" * (3 << 20)),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        (b"iCCP", b"profile\0\0no zlib"),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_texts_and_profiles_of_a_png_do_not_matter(chunk, place):
    data = encoded(50, 40, "PNG")
    at = 33 if place == "before" else len(data) - 12  # after IHDR, or before IEND
    changed = data[:at] + _chunk(*chunk) + data[at:]
    np.testing.assert_array_equal(decode(changed, ImageLimits()), decode(data, ImageLimits()))


@pytest.mark.parametrize(
    ("limits", "size", "named"),
    [
        (ImageLimits(max_pixels=100), (20, 20), "20x20; data.max_image_pixels is 100"),
        (ImageLimits(min_side=30), (20, 20), "data.min_image_side is 30"),
        (ImageLimits(max_aspect=2), (90, 20), "data.max_aspect is 2"),
        (ImageLimits(max_bytes=10), (20, 20), "data.max_image_bytes is 10"),
    ],
)
def test_reasons_name_their_limit(limits, size, named):
    with pytest.raises(BadSample) as error:
        decode(encoded(*size), limits)
    assert named in error.value.detail


def test_a_limit_can_be_raised_beyond_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for form in ("PNG", "BMP", "WEBP"):
        assert decode(encoded(50, 40, form), ImageLimits()).shape == (40, 50, 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *said: int) -> bytes:
    """A black picture; ``said``: sides of heads before the true one."""
    heads = [chunk(b"IHDR", struct.pack(">IIBBBBB", each, each, 8, 0, 0, 0, 0)) for each in (*said, side)]
    packed = zlib.compress(bytes((side + 1) * side), 9)
    return b"".join([b"\x89PNG\r\n\x1a\n", *heads, chunk(b"IDAT", packed), chunk(b"IEND", b"")])


def ico(inner: bytes, side: int) -> bytes:
    """An icon that says it is ``side`` pixels wide."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, side, side, 0, 0, 1, 32, len(inner), 22) + inner


def gif_of_a_large_frame(side: int, frame: int) -> bytes:
    data = bytearray(encoded(frame, frame, "GIF"))
    data[6:10] = struct.pack("<HH", side, side)  # the screen; frames have sizes of their own
    return bytes(data)


LARGE = 2500
LIES = {
    "a second head in a PNG": png(LARGE, 16),
    "a large PNG in a small icon": ico(png(LARGE), 16),
    "a large frame on a small GIF's screen": gif_of_a_large_frame(16, LARGE),
    "a large icon in an icon": ico(ico(png(LARGE), 16), 16),
}


def counting(make: Callable[..., Any], made: list[int]) -> Callable[..., Any]:
    def counted(mode: str, size: tuple[int, int], *more: Any) -> Any:
        made.append(size[0] * size[1])
        return make(mode, size, *more)

    return counted


@pytest.mark.parametrize("lie", LIES)
def test_what_is_larger_than_its_head_says_takes_no_memory(lie: str, monkeypatch: pytest.MonkeyPatch):
    """Nothing is made of more pixels than the limit: Pillow makes all of its memory by ``Image.core``."""
    made: list[int] = []
    for name in ("new", "fill"):
        monkeypatch.setattr(Image.core, name, counting(getattr(Image.core, name), made))
    limits = ImageLimits(max_pixels=LARGE * LARGE // 2, min_side=1, max_aspect=1000)
    with pytest.raises(BadSample) as error:
        decode(LIES[lie], limits)
    assert error.value.reason in ("image_too_large", "corrupt_image", "bad_image_header", "not_an_image")
    assert max(made, default=0) <= limits.max_pixels


def test_the_lies_would_be_decoded_where_they_are_allowed():
    """So that the test above looks at what it says."""
    limits = ImageLimits(min_side=1, max_aspect=1000)
    shapes = [decode(LIES[lie], limits).shape[:2] for lie in list(LIES)[:3]]
    assert shapes == [(LARGE, LARGE)] * 3


def progressive(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode(encoded(width, height), ImageLimits())).save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


def of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = progressive(64, 48)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    return whole[:-2] + scan * (count - whole.count(b"\xff\xda")) + whole[-2:]


def test_a_jpeg_of_too_many_scans_is_not_decoded():
    assert decode(progressive(64, 48), ImageLimits()).shape == (48, 64, 3)
    assert not has_more_scans(of_scans(MOST_SCANS), MOST_SCANS)
    with pytest.raises(BadSample) as error:
        decode(of_scans(MOST_SCANS + 1), ImageLimits())
    assert error.value.reason == "image_too_many_scans"


def test_what_only_looks_like_scans_does_not_count():
    """In metadata, and after the end, where telephones put a video."""
    plain = encoded(64, 48, "JPEG")
    noise = b"\xff\xda\x00\x02" * 5000
    segment = b"\xff\xef" + struct.pack(">H", len(noise) + 2) + noise
    for data in (plain[:2] + segment + plain[2:], plain + noise):
        np.testing.assert_array_equal(decode(data, ImageLimits()), decode(plain, ImageLimits()))
