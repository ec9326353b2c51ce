import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data_pipelines.encoding.decoding import SIZE_REASONS, ImageLimits, decode
from data_pipelines.errors import BadSample
from data_pipelines.records.image_header import read_header

LIMITS = ImageLimits(min_side=1, max_aspect=1e9)
RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 72)))


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(BadSample) as error:
        decode(data, limits)
    return error.value.reason


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 75, "progressive": True}, {"subsampling": 0}])
def test_jpeg_decodes_as_pillow_does(options):
    data = encoded(Image.fromarray(SMOOTH), "JPEG", **options)
    np.testing.assert_array_equal(decode(data, LIMITS), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(SMOOTH), format, exif=exif, **options)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode(data, LIMITS), wanted)
    assert wanted.shape == ((96, 72, 3) if orientation >= 5 else (72, 96, 3))


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def turned_elsewhere() -> dict[str, bytes]:
    """Images whose orientation stands in places that Pillow asks besides EXIF, and one in odd colours with EXIF."""
    image, exif = Image.fromarray(SMOOTH), Image.Exif()
    exif[0x0112] = 6
    xmp, profile = PngInfo(), PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP)
    raw = exif.tobytes()
    profile.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n", zip=True)
    return {
        "png xmp": encoded(image, pnginfo=xmp),
        "png profile": encoded(image, pnginfo=profile),
        "webp xmp": encoded(image, "WEBP", xmp=XMP.encode()),
        "cmyk xmp": encoded(image.convert("CMYK"), "JPEG", xmp=XMP.encode()),
        "cmyk exif": encoded(image.convert("CMYK"), "JPEG", exif=exif),
        "tiff": encoded(image, "TIFF", exif=exif),
    }


@pytest.mark.parametrize("name", turned_elsewhere())
def test_header_and_decoder_agree_on_what_is_upright(name):
    data = turned_elsewhere()[name]
    assert decode(data, LIMITS).shape[1::-1] == read_header(data).size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (16, 8), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (0, 0, 8, 8))
    image.paste((0, 0, 0, 128), (8, 4, 16, 8))
    if mode == "P":
        image = image.quantize(8)
        data = encoded(image, "PNG")
    else:
        data = encoded(image.convert(mode), "PNG")
    pixels = decode(data, LIMITS)
    assert (pixels[:, :8] == 255).all()
    assert abs(int(pixels[6, 12, 1]) - 127) <= 2
    assert (pixels[1, 12] == ((200, 0, 0) if mode != "LA" else pixels[1, 12])).all()


def test_transparent_colour_of_png_becomes_white():
    data = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (decode(data, LIMITS) == 255).all()


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 32 * 8).reshape(8, 32).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(ramp), format), LIMITS)
        np.testing.assert_array_equal(pixels[..., 0], np.round(ramp / 257).astype(np.uint8))
        assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("high", [1.0, 255.0, 9000.0])
def test_floats_are_scaled(high):
    ramp = np.linspace(0, high, 64, dtype=np.float32).reshape(8, 8)
    pixels = decode(encoded(Image.fromarray(ramp), "TIFF"), LIMITS)[..., 0].ravel()
    assert pixels[0] == 0 and pixels[-1] == 255 and (np.diff(pixels.astype(int)) >= 0).all()


def test_cmyk_jpeg_has_the_right_colours():
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(data, LIMITS).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data, LIMITS).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours_become_rgb(mode):
    image = Image.fromarray(SMOOTH).convert(mode)
    np.testing.assert_array_equal(decode(encoded(image), LIMITS), np.asarray(image.convert("RGB")))


def test_bad_images_have_reasons():
    jpeg = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    png = encoded(Image.fromarray(SMOOTH))
    assert reason(b"") == "empty_image"
    assert reason(b"<html><body>404</body></html>") == "not_an_image"
    assert reason(jpeg[: len(jpeg) // 2]) == "truncated_image"
    assert reason(png[: len(png) // 2]) == "truncated_image"
    scan = bytearray(jpeg)
    scan[-800:-400] = bytes(RNG.integers(0, 255, 400, dtype=np.uint8))
    assert reason(bytes(scan)) in ("corrupt_image", "truncated_image")
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") != ""


def test_limits_are_looked_at_before_decoding():
    limits = ImageLimits(max_pixels=10_000, max_bytes=5_000, min_side=8, max_aspect=10)
    # Headers only: decoding them would fail, or take gigabytes.
    frame = struct.pack(">BHHB", 8, 65000, 65000, 1) + b"\x01\x11\x00"
    bomb = b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xd9"
    assert reason(bomb, limits) == "image_too_large"
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    assert reason(b"\x89PNG\r\n\x1a\n" + chunk, limits) == "image_too_large"
    assert reason(encoded(Image.new("RGB", (1, 1))), limits) == "image_too_small"
    assert reason(encoded(Image.new("RGB", (300, 8))), limits) == "image_too_elongated"
    assert reason(b"\0" * 5001, limits) == "image_too_many_bytes"


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((20, 10), {"max_pixels": 200}, ""),
        ((20, 10), {"max_pixels": 199}, "image_too_large"),
        ((20, 10), {"min_side": 10}, ""),
        ((10, 20), {"min_side": 10}, ""),
        ((20, 10), {"min_side": 11}, "image_too_small"),
        ((10, 20), {"min_side": 11}, "image_too_small"),
        ((20, 10), {"max_aspect": 2.0}, ""),
        ((20, 10), {"max_aspect": 1.99}, "image_too_elongated"),
        ((10, 20), {"max_aspect": 2.0}, ""),
        ((10, 20), {"max_aspect": 1.99}, "image_too_elongated"),
        ((20, 10), {"max_pixels": 199, "min_side": 11, "max_aspect": 1.0}, "image_too_large"),  # the first counts
        ((20, 10), {"min_side": 11, "max_aspect": 1.0}, "image_too_small"),
    ],
    ids=str,
)
def test_images_at_their_limits(size, limits, expected):
    data, limits = encoded(Image.new("RGB", size)), dataclasses.replace(LIMITS, **limits)
    assert reason(data, limits) == expected if expected else decode(data, limits).shape[1::-1] == size
    assert SIZE_REASONS[limits.refuse(*size)] == expected


def test_files_at_their_limit():
    data = encoded(Image.fromarray(SMOOTH))
    assert decode(data, dataclasses.replace(LIMITS, max_bytes=len(data))).shape == SMOOTH.shape
    assert reason(data, dataclasses.replace(LIMITS, max_bytes=len(data) - 1)) == "image_too_many_bytes"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpegs_suffice_in_both_directions_of_the_upright_image(orientation):
    """Wide as stored; width and height are asked for upright, where half of the stored size will do."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.asarray(Image.fromarray(SMOOTH).resize((640, 160), Image.Resampling.BICUBIC))
    data = encoded(Image.fromarray(stored), "JPEG", quality=95, exif=exif)
    turned = orientation >= 5
    whole = decode(data, LIMITS)
    half = decode(data, LIMITS, at_least=(20, 320) if turned else (320, 20))
    assert whole.shape == ((640, 160, 3) if turned else (160, 640, 3))
    assert half.shape == (whole.shape[0] // 2, whole.shape[1] // 2, 3)
    means = whole.reshape(half.shape[0], 2, half.shape[1], 2, 3).mean((1, 3))
    assert np.abs(means - half).mean() < 2


@pytest.mark.parametrize(
    ("low", "high", "pixels"),
    [
        (0.0, 0.5, (0, 128)),
        (0.2, 1.0, (51, 255)),
        (0.0, 128.0, (0, 128)),
        (3.0, 255.0, (3, 255)),
        (0.0, 256.0, (0, 255)),
        (-1.0, 1.0, (0, 255)),
    ],
)
def test_floats_keep_a_range_that_is_usual(low, high, pixels):
    """0..1 and 0..255 stand for black to white; any other range is stretched."""
    ramp = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    found = decode(encoded(Image.fromarray(ramp), "TIFF"), LIMITS)[..., 0]
    assert (found.min(), found.max()) == pixels
