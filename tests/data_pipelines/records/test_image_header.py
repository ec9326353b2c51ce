"""Sizes read from headers equal what decoders find, upright."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipelines.errors import BadSample
from data_pipelines.records.image_header import read_header
from tests.data_pipelines.shard_tools import encoded


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_is_that_of_the_turned_image(format: str, orientation: int) -> None:
    data = encoded(31, 17, format, orientation)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    header = read_header(data)
    assert header.size == upright.size
    assert header.orientation == orientation
    assert header.format == format.lower()


@pytest.mark.parametrize("format", ["GIF", "BMP", "PPM"])
def test_other_formats(format: str) -> None:
    assert read_header(encoded(31, 17, format)).size == (31, 17)


def test_progressive_and_long_metadata() -> None:
    buffer = io.BytesIO()
    image = Image.new("RGB", (300, 200))
    image.save(buffer, "JPEG", progressive=True, icc_profile=b"\0" * 200_000, comment=b"c" * 60_000)
    assert read_header(buffer.getvalue()).size == (300, 200)


def test_png_orientation_behind_the_pixels() -> None:
    data = encoded(31, 17, "PNG", 6)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    with Image.open(io.BytesIO(moved)) as image:
        assert ImageOps.exif_transpose(image).size == (17, 31)
    assert read_header(moved).size == (17, 31)


def test_a_bomb_is_told_from_its_header() -> None:
    jpeg = bytearray(encoded(8, 8))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert read_header(bytes(jpeg)).size == (65535, 65535)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"<!DOCTYPE html><html>", "not_an_image"),
        (b"\0" * 1000, "not_an_image"),
        (b"\xff\xd8\xff", "bad_image_header"),
        (b"\xff\xd8\xff\xd9", "bad_image_header"),
        (b"\x89PNG\r\n\x1a\n", "bad_image_header"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 17, "bad_image_header"),
    ],
)
def test_bad_headers(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        read_header(data)
    assert error.value.reason == reason


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.integers(0, 400), st.binary(max_size=40))
def test_damaged_headers_give_a_size_or_a_bad_sample(format: str, position: int, damage: bytes) -> None:
    data = encoded(31, 17, format, 6 if format in ("JPEG", "PNG") else 1)
    broken = data[:position] + damage + data[position + len(damage) :]
    try:
        width, height = read_header(broken).size
    except BadSample as error:
        assert error.reason in ("empty_image", "not_an_image", "bad_image_header", "image_too_large")
    else:
        assert width > 0 and height > 0
