"""Tiles made on the accelerator: parts of decoded images, and the filter weights that turn them into tiles.

The filter is Pillow's bicubic for eight bits: along each axis an output pixel is a sum of neighbouring pixels with
weights in units of 2^-22, rounded half up and clipped, first horizontally, then vertically.
``mono_jax.parallel.crops`` computes these sums exactly, so that the tiles equal those of the exact path. Since version
13 Pillow resizes the height first for some images that shrink more in height than in width; no crops are made of these.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from data_pipelines.batch import TileGeometry

ONE = 1 << 22  # a weight of 1
_SUPPORT = 2.0  # of the filter, in pixels of the coarser side


@dataclasses.dataclass(frozen=True)
class Crops:
    """Room for the tiles of one row, or for some neighbouring tiles of a row, counted in visual tokens.

    Attributes:
      pixels: uint8 [tiles, C, C, 3]; the corner of each holds the part of an image that its tile depends on.
      starts: int32 [tiles, 2, edge, P]; for each row (0) and column (1) of a tile, the first pixel of its sum.
      weights: int32 [tiles, 2, edge, P, K], of that pixel and the following ones; 0 = none.
    """

    pixels: np.ndarray
    starts: np.ndarray
    weights: np.ndarray

    @classmethod
    def fields(cls, rows: int, visual_tokens: int, size: int, geometry: TileGeometry) -> dict[str, np.ndarray]:
        """The arrays of a batch, [rows, ...] each, by name: "crop_" plus the attribute's name."""
        tiles, edge = visual_tokens // geometry.tokens_per_tile, geometry.edge
        axes = rows, tiles, 2, edge, geometry.token_pixels
        taps = 2 * math.ceil(_SUPPORT * max(1.0, size / geometry.tile_size)) + 1
        return {
            "crop_pixels": np.empty((rows, tiles, size, size, 3), np.uint8),
            "crop_starts": np.zeros(axes, np.int32),
            "crop_weights": np.zeros((*axes, taps), np.int32),
        }

    @classmethod
    def of(cls, batch: dict[str, np.ndarray], row: int) -> Crops:
        return cls(*(batch[f"crop_{field.name}"][row] for field in dataclasses.fields(cls)))

    @property
    def _tokens(self) -> int:
        return self.starts.shape[2] ** 2

    def __len__(self) -> int:
        return len(self.pixels) * self._tokens

    def __getitem__(self, tokens: slice) -> Crops:
        start, stop, _ = tokens.indices(len(self))
        tiles = slice(start // self._tokens, stop // self._tokens)
        return Crops(self.pixels[tiles], self.starts[tiles], self.weights[tiles])

    def cut(self, image: np.ndarray, columns: int, rows: int) -> bool:
        """Fills these tiles, a grid over an image (uint8 [h, w, 3]); False if they must be made in another way.

        That is the case if there is no room for one of the parts, or if Pillow may resize the height first.
        """
        tile, (height, width) = self.starts[0, 0].size, image.shape[:2]
        if height > rows * tile and height * columns > width * rows:
            return False
        parts = [
            [_part(image.shape[axis], count * tile, number * tile, tile) for number in range(count)]
            for axis, count in ((0, rows), (1, columns))
        ]
        if any(part.stop - part.start > self.pixels.shape[1] for axis in parts for part in axis):
            return False
        self.weights[:] = 0
        for number, (y, x) in enumerate((y, x) for y in parts[0] for x in parts[1]):
            self.pixels[number, : y.stop - y.start, : x.stop - x.start] = image[y.start : y.stop, x.start : x.stop]
            for axis, part in enumerate((y, x)):
                self.starts[number, axis] = part.starts.reshape(self.starts.shape[2:])
                taps = part.weights.shape[1]
                self.weights[number, axis, ..., :taps] = part.weights.reshape(*self.starts.shape[2:], taps)
        return True

    def put(self, canvas: np.ndarray) -> None:
        """Fills these tiles with an image of whole tiles that needs no filtering."""
        tile = self.starts[0, 0].size
        if not self.cut(canvas, canvas.shape[1] // tile, canvas.shape[0] // tile):
            raise ValueError(f"room for {self.pixels.shape[1]} pixels, but a tile has {tile}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a tile depends on along one axis: pixels ``start`` to ``stop`` - 1, and its sums over them."""

    start: int
    stop: int
    starts: np.ndarray  # int32 [tile], of the sums, from ``start`` on; below 0 where the first weights are 0
    weights: np.ndarray  # int32 [tile, taps]


@functools.lru_cache(maxsize=2048)
def _part(size: int, out: int, first: int, tile: int) -> _Part:
    """The part for outputs ``first`` to ``first + tile`` - 1 of ``out``, computed from ``size`` pixels."""
    starts, weights = bicubic(size, out)
    starts, weights = starts[first : first + tile], weights[first : first + tile]
    used = weights != 0
    start = int((starts + used.argmax(axis=1)).min())
    stop = int((starts + used.shape[1] - used[:, ::-1].argmax(axis=1)).max())
    return _Part(start, stop, starts - start, weights)


@functools.lru_cache(maxsize=256)
def bicubic(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's sums for resizing ``size`` pixels to ``out``: first pixels int32 [out], weights int32 [out, taps]."""
    scale = size / out
    coarse = max(scale, 1.0)
    center = (np.arange(out) + 0.5) * scale
    low = np.maximum(0, (center - _SUPPORT * coarse + 0.5).astype(np.int64))
    high = np.minimum(size, (center + _SUPPORT * coarse + 0.5).astype(np.int64))
    places = low[:, None] + np.arange(2 * math.ceil(_SUPPORT * coarse) + 1)
    weights = np.where(places < high[:, None], _cubic((places - center[:, None] + 0.5) * (1.0 / coarse)), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    whole = np.trunc(weights * ONE + np.where(weights < 0, -0.5, 0.5))
    return low.astype(np.int32), whole.astype(np.int32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5."""
    x, a = np.abs(x), -0.5
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
