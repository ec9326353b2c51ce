"""From an encoded image to the raw pixels of its visual tokens: decoding, tiling, cutting."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.errors import BadSample, DataError
from data_pipelines.records.image_header import ImageHeader, formats, read_header


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What an image may be, judged by its header, before a pixel is decoded.

    Attributes:
      max_pixels: width * height as stored. Converting an image with alpha or floats takes up to 20 bytes a pixel.
      max_bytes: of the encoded file.
      min_side: the shorter edge in pixels; smaller ones are spacers and tracking pixels.
      max_aspect: longer edge / shorter edge; beyond are rules and gradients.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 50_000_000
    min_side: int = 8
    max_aspect: float = 50.0

    def refuse(self, width: int | np.ndarray, height: int | np.ndarray) -> int | np.ndarray:
        """0 for sizes that are fine, else an index of `SIZE_REASONS`; numbers or int64 arrays."""
        large = width * height > self.max_pixels
        small = (width < self.min_side) | (height < self.min_side)
        elongated = (width > height * self.max_aspect) | (height > width * self.max_aspect)
        return large * 1 + small * 2 + elongated * 4


_LARGE, _SMALL, _LONG = "image_too_large", "image_too_small", "image_too_elongated"
# By the sum of what `ImageLimits.refuse` finds wrong; the first of several counts.
SIZE_REASONS = ("", _LARGE, _SMALL, _LARGE, _LONG, _LARGE, _SMALL, _LARGE)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an image becomes tiles, and tiles become visual tokens ("dynamic resolution" of the public release)."""

    tile_size: int = 448
    token_pixels: int = 28
    min_tiles: int = 1
    max_tiles: int = 6
    thumbnail: bool = True
    ps_version: str = "v2"

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.token_pixels) ** 2

    def shared(self, images: int) -> Tiling:
        """The tiling of each image of a sample with so many: they share `max_tiles`."""
        limit = max(1, self.max_tiles // max(1, images))
        return dataclasses.replace(self, max_tiles=limit, min_tiles=min(self.min_tiles, limit))

    def choose(self, sizes: np.ndarray) -> np.ndarray:
        """The grid of each image.

        Args:
          sizes: [n, 2] (width, height) in pixels.

        Returns:
          int32 [n, 2] (columns, rows): the grid whose aspect ratio is nearest the image's; of equally near ones the
          largest of which the image has more than half the pixels, or else the smallest.
        """
        grids = _grids(self.min_tiles, self.max_tiles)
        width, height = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
        distance = np.abs(width / height - grids[:, 0] / grids[:, 1])
        nearest = distance == distance.min(axis=1, keepdims=True)
        # Grids come in increasing number of tiles, so the last that is big enough is the largest.
        enough = nearest & (width * height > 0.5 * self.tile_size * self.tile_size * grids[:, 0] * grids[:, 1])
        last = len(grids) - 1 - np.argmax(enough[:, ::-1], axis=1)
        return grids[np.where(enough.any(axis=1), last, np.argmax(nearest, axis=1))]

    def tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Visual tokens of images of these sizes ([n, 2] width, height): int32 [n]."""
        columns, rows = self.choose(sizes).T
        tiles = columns * rows
        return (tiles + (self.thumbnail & (tiles > 1))).astype(np.int32) * self.tokens_per_tile


@functools.lru_cache
def _grids(low: int, high: int) -> np.ndarray:
    """All (columns, rows) with low <= columns * rows <= high in increasing number of tiles: int32 [n, 2]."""
    grids = [(c, r) for c in range(1, high + 1) for r in range(1, high // c + 1) if c * r >= low]
    return np.array(sorted(grids, key=lambda grid: grid[0] * grid[1]), np.int32)


def cells(tiling: Tiling, tokens: int) -> np.ndarray:
    """`patch_cells` of `tokens` visual tokens in their order: int32 [tokens], cells counted row by row in a tile."""
    tile = _tile_cells(tiling.tile_size // tiling.token_pixels, tiling.ps_version)
    return np.tile(tile, tokens // len(tile))


@functools.lru_cache
def _tile_cells(edge: int, ps_version: str) -> np.ndarray:
    grid = np.arange(edge * edge, dtype=np.int32).reshape(edge, edge)
    return (grid if ps_version == "v2" else grid.T).ravel()


def check_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """The header of an image worth decoding.

    Raises BadSample: "empty_image", "not_an_image", "bad_image_header", "image_too_many_bytes" or a size reason.
    """
    if len(data) > limits.max_bytes:
        raise BadSample("image_too_many_bytes", detail=f"{len(data)} bytes, limit {limits.max_bytes}")
    header = read_header(data)
    if code := limits.refuse(*header.size):
        raise BadSample(SIZE_REASONS[code], detail=f"{header.width}x{header.height}")
    return header


def decode(data: bytes, limits: ImageLimits, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes the first frame of an image, upright, on white where it is transparent.

    Args:
      data: the encoded file.
      limits: looked at before decoding.
      at_least: (width, height) of the upright image that suffice: a JPEG may be decoded at a reduced scale.

    Returns:
      uint8 [height, width, 3] RGB.

    Raises:
      BadSample: as `check_header`, and "truncated_image", "corrupt_image".
    """
    header = check_header(data, limits)
    if header.format == "jpeg" and _is_plain_jpeg(data):
        width, height = (at_least or (0, 0))[:: -1 if header.orientation >= 5 else 1]
        try:
            return _upright(simplejpeg.decode_jpeg(data, min_width=width, min_height=height), header.orientation)
        except ValueError as error:
            raise BadSample(_damage(str(error)), detail=str(error)) from None
    return _decode_with_pillow(data, limits, header.orientation)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg can take it. Pillow knows odd subsampling, and Adobe's inverted inks of CMYK."""
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


def _decode_with_pillow(data: bytes, limits: ImageLimits, orientation: int) -> np.ndarray:
    """``orientation``: what the header says. Pillow's own reading of it would differ, since it asks XMP too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are judged by `limits`; oddities in metadata do not matter here
            with Image.open(io.BytesIO(data), formats=formats()) as image:
                image.load()
                # Some headers lie, and some formats hold several sizes: what was decoded counts.
                if code := limits.refuse(*image.size):
                    raise BadSample(SIZE_REASONS[code], detail=f"{image.width}x{image.height}")
                # Pillow has turned a TIFF upright on loading.
                return _upright(np.asarray(_rgb(image)), 1 if image.format == "TIFF" else orientation)
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

    Integers are 16-bit (65535 = white) unless all of them fit in 8 bits; floats are 0..1 if they lie there, else
    0..255 if they lie there, else stretched between their extremes.
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


class ExactResizer:
    """Resizes one image with Pillow's bicubic: byte for byte what the public release does."""

    def __init__(self, image: np.ndarray):
        """image: uint8 [h, w, 3]."""
        self._image = Image.fromarray(image)

    def __call__(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        return np.asarray(self._image.resize((width, height), Image.Resampling.BICUBIC))


_of_thread = threading.local()


class FastResizer:
    """Resizes one image with the same filter in SIMD, rounding otherwise. Needs the optional package cykooz.resizer."""

    def __init__(self, image: np.ndarray):
        """image: uint8 [h, w, 3]. Raises DataError if the package is missing."""
        try:
            import cykooz_resizer
        except ImportError:
            raise DataError("data.pixel_path='fast' needs a package: pip install cykooz.resizer") from None
        self._lib = cykooz_resizer
        height, width = image.shape[:2]
        self._image = self._lib.ImageData(width, height, self._lib.PixelType.U8x3, image.tobytes())

    def __call__(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        resized = self._lib.ImageData(width, height, self._lib.PixelType.U8x3)
        if not hasattr(_of_thread, "resizer"):  # it keeps buffers, and serves one thread
            bicubic = self._lib.ResizeAlg.convolution(self._lib.FilterType.catmull_rom)
            _of_thread.resizer = self._lib.Resizer(), self._lib.ResizeOptions(bicubic)
        resizer, options = _of_thread.resizer
        resizer.resize(self._image, resized, options)
        return np.frombuffer(resized.get_buffer(), np.uint8).reshape(height, width, 3)


RESIZERS = {"exact": ExactResizer, "fast": FastResizer}


def cut_tiles(image: np.ndarray, tiling: Tiling, out: np.ndarray) -> None:
    """Cuts an image of whole tiles into visual tokens: tiles row by row, tokens within a tile as `ps_version` says.

    Args:
      image: uint8 [rows * tile, columns * tile, 3].
      out: uint8 [rows * columns * tokens_per_tile, P, P, 3], contiguous, is filled.
    """
    pixels, edge = tiling.token_pixels, tiling.tile_size // tiling.token_pixels
    rows, columns = image.shape[0] // tiling.tile_size, image.shape[1] // tiling.tile_size
    grid = image.reshape(rows, edge, pixels, columns, edge, pixels, 3)
    axes = (0, 3, 1, 4, 2, 5, 6) if tiling.ps_version == "v2" else (0, 3, 4, 1, 2, 5, 6)
    out.reshape(rows, columns, edge, edge, pixels, pixels, 3)[:] = grid.transpose(axes)


def image_patches(
    data: bytes,
    tiling: Tiling,
    limits: ImageLimits,
    pixel_path: str = "exact",
    augment: np.random.Generator | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """An encoded image as visual tokens: tiles in reading order, the thumbnail last.

    Args:
      pixel_path: "exact" or "fast".
      augment: source of the random JPEG qualities; None = no augmentation.
      out: uint8 [at least v, P, P, 3], contiguous: where to write; None = new memory.

    Returns:
      uint8 [v, P, P, 3], v = `tiling.tokens` of the image's size.

    Raises:
      BadSample: as `decode`, and "length_mismatch" if `out` is too small.
    """
    tile = tiling.tile_size
    wanted = None
    if pixel_path == "fast":
        columns, rows = _grid_of(*check_header(data, limits).size, tiling)
        wanted = columns * tile, rows * tile
    image = decode(data, limits, wanted)
    if wanted is None:
        columns, rows = _grid_of(image.shape[1], image.shape[0], tiling)
    sizes = [(columns, rows)] + [(1, 1)] * (tiling.thumbnail and columns * rows > 1)
    resize: Callable[[int, int], np.ndarray] = RESIZERS[pixel_path](image)
    count = sum(across * down for across, down in sizes) * tiling.tokens_per_tile
    if out is None:
        out = np.empty((count, tiling.token_pixels, tiling.token_pixels, 3), np.uint8)
    elif len(out) < count:
        raise BadSample("length_mismatch", detail=f"{count} visual tokens, room for {len(out)}: is the index stale?")
    start = 0
    for across, down in sizes:
        same = image.shape == (down * tile, across * tile, 3)
        canvas = image if same else resize(across * tile, down * tile)
        if augment is not None:
            canvas = _recompressed(canvas, tile, augment)
        stop = start + across * down * tiling.tokens_per_tile
        cut_tiles(canvas, tiling, out[start:stop])
        start = stop
    return out[:count]


@functools.lru_cache(maxsize=65_536)
def _grid_of(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    columns, rows = tiling.choose(np.array([[width, height]]))[0]
    return int(columns), int(rows)


def _recompressed(canvas: np.ndarray, tile: int, rng: np.random.Generator) -> np.ndarray:
    """Each tile through JPEG at a quality of its own, 75..100."""
    canvas = canvas.copy()
    for top in range(0, canvas.shape[0], tile):
        for left in range(0, canvas.shape[1], tile):
            view = canvas[top : top + tile, left : left + tile]
            encoded = simplejpeg.encode_jpeg(
                np.ascontiguousarray(view), quality=int(rng.integers(75, 101)), colorsubsampling="420"
            )
            view[:] = simplejpeg.decode_jpeg(encoded)
    return canvas


def normalise(patches: np.ndarray) -> np.ndarray:
    """What the device does with raw pixels, on the host, for tests: uint8 [..., 3] -> float32 [..., 3]."""
    return (patches.astype(np.float32) / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD
