"""Images that decoders refuse for what does not matter, and the limits that reasons name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.errors import BadSample
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
