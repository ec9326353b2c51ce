"""From an encoded image to its pixels: limits, checked against the header, and decoding."""

from __future__ import annotations

import dataclasses
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.encoding.bombs import MAX_SCANS, inner_sizes, scans
from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats
from data_pipelines.records.image_header import ImageHeader, formats, read_header, without_metadata


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """Limits on an image, checked against its header before any pixel is decoded.

    Attributes:
      max_pixels: width * height as stored. Converting an image with alpha or floats takes up to 20 bytes per pixel.
      max_bytes: of the encoded file.
      min_side: the shorter edge in pixels; smaller images are spacers and tracking pixels.
      max_aspect: longer edge / shorter edge; images beyond it are rules and gradients.
      truncated_jpegs: whether truncated JPEGs are decoded as far as they go; the missing part is grey.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 50_000_000
    min_side: int = 8
    max_aspect: float = 50.0
    truncated_jpegs: bool = False

    def refuse(self, width: int | np.ndarray, height: int | np.ndarray) -> int | np.ndarray:
        """0 for acceptable sizes, otherwise an index into ``SIZE_REASONS``; for numbers or int64 arrays."""
        large = width * height > self.max_pixels
        small = (width < self.min_side) | (height < self.min_side)
        elongated = (width > height * self.max_aspect) | (height > width * self.max_aspect)
        return large * 1 + small * 2 + elongated * 4

    def named(self, code: int) -> str:
        """The key and the value of the limit that ``refuse`` found exceeded."""
        if code & 1:
            return f"data.max_image_pixels is {self.max_pixels}"
        return f"data.min_image_side is {self.min_side}" if code & 2 else f"data.max_aspect is {self.max_aspect:g}"


_PLUGINS = {"heif": "HEIF", "jxl": "JXL"}  # Pillow's names of formats that are only opened where they are expected
_LARGE, _SMALL, _LONG = "image_too_large", "image_too_small", "image_too_elongated"
# Indexed by the sum of what `ImageLimits.refuse` finds wrong; the first of several reasons counts.
SIZE_REASONS = ("", _LARGE, _SMALL, _LARGE, _LONG, _LARGE, _SMALL, _LARGE)


def check_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """The header of an image that is acceptable for decoding.

    Raises BadSample: "image_too_many_bytes", a size reason, "image_too_many_scans", or as ``read_header``.
    """
    if len(data) > limits.max_bytes:
        raise BadSample("image_too_many_bytes", detail=f"{len(data)} bytes; data.max_image_bytes is {limits.max_bytes}")
    header = read_header(data)
    _judge(header.size, limits)
    if header.format == "jpeg" and (count := scans(data)) > MAX_SCANS:
        raise BadSample("image_too_many_scans", detail=f"{count} scans; a JPEG may have at most {MAX_SCANS}")
    return header


def _judge(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raises BadSample with a size reason."""
    if code := limits.refuse(*size):
        raise BadSample(SIZE_REASONS[code], detail=f"{size[0]}x{size[1]}; {limits.named(code)}")


def decode(data: bytes, limits: ImageLimits, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes the first frame of an image, upright, on white where it is transparent.

    Args:
      data: the encoded file.
      limits: checked before decoding.
      at_least: (width, height) of the upright image that is sufficient: a JPEG may be decoded at a reduced scale.

    Returns:
      uint8 [height, width, 3] RGB.

    Raises:
      BadSample: as ``check_header``, and "truncated_image", "corrupt_image".
    """
    header = check_header(data, limits)
    if header.format == "jpeg" and _is_plain_jpeg(data):
        width, height = (at_least or (0, 0))[:: -1 if header.orientation >= 5 else 1]
        try:
            return _upright(_jpeg(data, width, height, limits.truncated_jpegs), header.orientation)
        except ValueError as error:
            raise BadSample(_damage(str(error)), detail=str(error)) from None
    data = extra_formats.draw(data) if header.format == "svg" else data
    return _decode_with_pillow(data, limits, header)


def _jpeg(data: bytes, width: int, height: int, cut: bool) -> np.ndarray:
    """Decodes a JPEG, even if its end marker is missing or replaced by zeros or, with ``cut``, if more is missing.

    Raises ValueError.
    """
    try:
        return simplejpeg.decode_jpeg(data, min_width=width, min_height=height)
    except ValueError as error:
        if _damage(str(error)) != "truncated_image":
            raise
    if cut:
        return simplejpeg.decode_jpeg(data, min_width=width, min_height=height, strict=False)
    held = data.rstrip(b"\0") if data.endswith(bytes(64)) else data.removesuffix(b"\xff")
    return simplejpeg.decode_jpeg(held + b"\xff\xd9", min_width=width, min_height=height)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg can decode it. Unusual subsampling and Adobe's inverted CMYK inks are left to Pillow."""
    try:
        return simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray", "RGB")
    except ValueError:
        return False


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation (1..8)."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def _damage(message: str) -> str:
    truncated = any(word in message.lower() for word in ("truncated", "premature end", "unexpected end"))
    return "truncated_image" if truncated else "corrupt_image"


def _decode_with_pillow(data: bytes, limits: ImageLimits, header: ImageHeader) -> np.ndarray:
    """``header``: its orientation is used. Pillow's own reading would differ, since it also considers XMP."""
    try:
        with warnings.catch_warnings():
            Image.MAX_IMAGE_PIXELS = None  # `limits` are the limit
            warnings.simplefilter("ignore")  # sizes are checked by `limits`; oddities in metadata do not matter here
            file = io.BytesIO(without_metadata(data))
            with Image.open(file, formats=formats(_PLUGINS.get(header.format, ""))) as image:
                # Some headers are wrong, some formats hold several sizes: what is decoded is checked before and after.
                _judge(image.size, limits)
                for width, height in inner_sizes(image, data):
                    if limits.refuse(width, height) & 1:
                        _judge((width, height), limits)
                image.load()
                _judge(image.size, limits)
                # TIFF and JPEG XL have been turned upright on loading, unless the content is a JPEG.
                turned = image.format == "TIFF" or (image.format == "JXL" and not image.jpeg)
                return _upright(np.asarray(_rgb(image)), 1 if turned else header.orientation)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", detail=str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadSample("not_an_image", detail=f"not one of {', '.join(formats())}") from None
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more
        raise BadSample(_damage(str(error)), detail=f"{type(error).__name__}: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, which Pillow's own conversion clips at 255: uint8 of the same shape.

    Integers are 16-bit (65535 = white) unless all of them fit in 8 bits. Floats are read as 0..1 if all are in that
    range, otherwise as 0..255 if all are in that range, otherwise stretched between their extremes.
    """
    if values.dtype.kind != "f":
        values = np.clip(values, 0, 65535).astype(np.uint32)
        return ((values + 128) // 257 if values.max(initial=0) > 255 else values).astype(np.uint8)
    values = np.nan_to_num(values)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.round((values - low) * (255 / (high - low))).astype(np.uint8)
