"""From an encoded image to the raw pixels of its visual tokens: resizing to the grid, cutting, augmentation."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.batch import TileGeometry
from data_pipelines.encoding.crops import Crops
from data_pipelines.encoding.decoding import ImageLimits, check_header, decode
from data_pipelines.encoding.tiling import Tiling, cut_tiles, grid_of, image_cells
from data_pipelines.errors import BadSample, DataError


class ExactResizer:
    """Resizes one image with Pillow's bicubic filter, byte for byte as the public release does."""

    def __init__(self, image: np.ndarray):
        """image: uint8 [h, w, 3]."""
        self._image = Image.fromarray(image)

    def __call__(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        return np.asarray(self._image.resize((width, height), Image.Resampling.BICUBIC))


_of_thread = threading.local()


class FastResizer:
    """Resizes one image with the same filter using SIMD, with other rounding. Needs the optional cykooz.resizer."""

    def __init__(self, image: np.ndarray):
        """image: uint8 [h, w, 3]. Raises DataError if the package is missing."""
        try:
            import cykooz_resizer
        except ImportError:
            raise DataError("pixel_path='fast' needs a package: pip install cykooz.resizer") from None
        self._lib = cykooz_resizer
        height, width = image.shape[:2]
        self._image = self._lib.ImageData(width, height, self._lib.PixelType.U8x3, image.tobytes())

    def __call__(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        resized = self._lib.ImageData(width, height, self._lib.PixelType.U8x3)
        if not hasattr(_of_thread, "resizer"):  # it keeps buffers and can be used by one thread only
            bicubic = self._lib.ResizeAlg.convolution(self._lib.FilterType.catmull_rom)
            _of_thread.resizer = self._lib.Resizer(), self._lib.ResizeOptions(bicubic)
        resizer, options = _of_thread.resizer
        resizer.resize(self._image, resized, options)
        return np.frombuffer(resized.get_buffer(), np.uint8).reshape(height, width, 3)


# Where there is no room for crops, tiles of "device" are made here, with the same bytes.
RESIZERS = {"exact": ExactResizer, "fast": FastResizer, "device": ExactResizer}


def check_pixel_path(pixel_path: str) -> None:
    """Raises DataError if its package is missing: now, not at the first image."""
    RESIZERS[pixel_path](np.zeros((1, 1, 3), np.uint8))


def image_patches(data: bytes, tiling: Tiling, limits: ImageLimits, *args: Any, **options: Any) -> np.ndarray:
    """The pixels returned by ``image_tokens``, which takes the same arguments."""
    return image_tokens(data, tiling, limits, *args, **options)[0]


def image_tokens(
    data: bytes,
    tiling: Tiling,
    limits: ImageLimits,
    pixel_path: str = "exact",
    augment: np.random.Generator | None = None,
    out: np.ndarray | Crops | None = None,
) -> tuple[np.ndarray | Crops, np.ndarray]:
    """An encoded image as visual tokens: tiles in reading order, the thumbnail last.

    Args:
      pixel_path: "exact", "fast" or "device".
      augment: source of the random JPEG qualities; None = no augmentation.
      out: uint8 [at least v, P, P, 3], contiguous, or crops: where to write; None = new memory.

    Returns:
      Pixels uint8 [v, P, P, 3] and ``patch_cells`` int32 [v], v = ``tiling.tokens`` of the image's size.

    Raises:
      BadSample: as ``decode``, and "length_mismatch" if ``out`` is too small.
    """
    geometry, thumbnail = tiling.geometry, tiling.thumbnail
    if geometry.native:  # each token is its own tile
        geometry, thumbnail = TileGeometry(geometry.token_pixels, geometry.token_pixels), False
    tile = geometry.tile_size
    wanted = None
    if pixel_path == "fast":
        columns, rows = grid_of(*check_header(data, limits).size, tiling)
        wanted = columns * tile, rows * tile
    image = decode(data, limits, wanted)
    if wanted is None:
        columns, rows = grid_of(image.shape[1], image.shape[0], tiling)
    sizes = [(columns, rows)] + [(1, 1)] * (thumbnail and columns * rows > 1)
    resizer = functools.cache(lambda: RESIZERS[pixel_path](image))  # lazily, since it copies the image
    count = sum(across * down for across, down in sizes) * geometry.tokens_per_tile
    if out is None:
        out = np.empty((count, geometry.token_pixels, geometry.token_pixels, 3), np.uint8)
    elif len(out) < count:
        raise BadSample("length_mismatch", detail=f"{count} visual tokens, room for {len(out)}: is the index stale?")
    start = 0
    for across, down in sizes:
        room = out[start : (start := start + across * down * geometry.tokens_per_tile)]
        if isinstance(room, Crops) and augment is None and room.cut(image, across, down):
            continue
        same = image.shape == (down * tile, across * tile, 3)
        canvas = image if same else resizer()(across * tile, down * tile)
        if augment is not None:
            canvas = _recompressed(canvas, max(canvas.shape) if tiling.geometry.native else tile, augment)
        if isinstance(room, Crops):
            room.put(canvas)
        else:
            cut_tiles(canvas, geometry, room)
    return out[:count], image_cells(tiling, columns, rows)


def _recompressed(canvas: np.ndarray, tile: int, rng: np.random.Generator) -> np.ndarray:
    """Each tile re-encoded as JPEG at its own quality, 75..100."""
    canvas = canvas.copy()
    for top in range(0, canvas.shape[0], tile):
        for left in range(0, canvas.shape[1], tile):
            view = canvas[top : top + tile, left : left + tile]
            encoded = simplejpeg.encode_jpeg(
                np.ascontiguousarray(view), quality=int(rng.integers(75, 101)), colorsubsampling="420"
            )
            view[:] = simplejpeg.decode_jpeg(encoded)
    return canvas
