"""Which grid of tiles an image becomes, how many visual tokens it has, and which pixels each of them holds."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from data_pipelines.batch import DEFAULT_GEOMETRY, NativeGeometry, TileGeometry, native_cells


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an image becomes tiles ("dynamic resolution" of the public release), and tiles become visual tokens.

    In native resolution (``geometry.native``) there are no tiles: an image keeps its size and shape, rounded to whole
    tokens, and is downscaled if it has more tokens than ``max_tiles`` tiles.

    Attributes:
      geometry: of a tile.
      min_tiles, max_tiles: tiles per image, not counting the thumbnail.
      thumbnail: whether the whole image is added as one more tile if there are several.
    """

    geometry: TileGeometry = DEFAULT_GEOMETRY
    min_tiles: int = 1
    max_tiles: int = 6
    thumbnail: bool = True

    def limited(self, most: int) -> Tiling:
        """The same with at most ``most`` tiles per image; 0 = unchanged."""
        return dataclasses.replace(self, max_tiles=most, min_tiles=min(self.min_tiles, most)) if most else self

    def shared(self, images: int) -> Tiling:
        """The tiling for each image of a sample with ``images`` images, which share ``max_tiles``."""
        limit = max(1, self.max_tiles // max(1, images))
        return dataclasses.replace(self, max_tiles=limit, min_tiles=min(self.min_tiles, limit))

    def choose(self, sizes: np.ndarray) -> np.ndarray:
        """The grid of each image.

        Args:
          sizes: [n, 2] (width, height) in pixels.

        Returns:
          int32 [n, 2] (columns, rows), in native resolution of tokens. Otherwise of tiles: the grid whose aspect ratio
          is nearest to the image's. Among equally near grids it is the largest of which the image has more than half
          the pixels, or else the smallest.
        """
        if self.geometry.native:
            return _native_grids(sizes, self.geometry.token_pixels, self.max_tiles * self.geometry.tokens_per_tile)
        grids = _grids(self.min_tiles, self.max_tiles)
        width, height = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
        distance = np.abs(width / height - grids[:, 0] / grids[:, 1])
        nearest = distance == distance.min(axis=1, keepdims=True)
        # Grids are in order of increasing number of tiles, so the last acceptable one is the largest.
        enough = nearest & (width * height > 0.5 * self.geometry.tile_size**2 * grids[:, 0] * grids[:, 1])
        last = len(grids) - 1 - np.argmax(enough[:, ::-1], axis=1)
        return grids[np.where(enough.any(axis=1), last, np.argmax(nearest, axis=1))]

    def tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Visual tokens of images of these sizes ([n, 2] width, height): int32 [n]."""
        columns, rows = self.choose(sizes).T
        tiles = columns * rows
        if self.geometry.native:
            return tiles
        return (tiles + (self.thumbnail & (tiles > 1))).astype(np.int32) * self.geometry.tokens_per_tile


@functools.lru_cache
def _grids(low: int, high: int) -> np.ndarray:
    """All (columns, rows) with low <= columns * rows <= high by increasing number of tiles: int32 [n, 2]."""
    grids = [(c, r) for c in range(1, high + 1) for r in range(1, high // c + 1) if c * r >= low]
    return np.array(sorted(grids, key=lambda grid: grid[0] * grid[1]), np.int32)


def _native_grids(sizes: np.ndarray, pixels: int, most: int) -> np.ndarray:
    """(columns, rows) of at most ``most`` tokens of ``pixels`` pixels for images [n, 2] (width, height)."""
    in_tokens = sizes.astype(np.float64) / pixels
    fits = np.sqrt(most / in_tokens.prod(axis=1))
    fits = np.minimum(fits, NativeGeometry.MOST / in_tokens.max(axis=1))[:, None]
    # Rounded to whole tokens; rounded down where there would otherwise be too many.
    near, below = np.round(in_tokens), np.floor(in_tokens * np.minimum(fits, 1) + 1e-9)
    whole = (near.prod(axis=1) <= most) & (near.max(axis=1) <= NativeGeometry.MOST)
    grids = np.maximum(np.where(whole[:, None], near, below), 1)
    return np.minimum(grids, most).astype(np.int32)


def image_cells(tiling: Tiling, columns: int, rows: int) -> np.ndarray:
    """``patch_cells`` of an image for which ``tiling`` chose a grid: int32 [v]."""
    if tiling.geometry.native:
        return native_cells(columns, rows)
    tiles = columns * rows
    return patch_cells(tiling.geometry, (tiles + (tiling.thumbnail and tiles > 1)) * tiling.geometry.tokens_per_tile)


def patch_cells(geometry: TileGeometry, tokens: int) -> np.ndarray:
    """``patch_cells`` of ``tokens`` visual tokens in order: int32 [tokens], cells numbered row by row within a tile."""
    tile = _tile_cells(geometry.edge, geometry.ps_version)
    return np.tile(tile, tokens // len(tile))


@functools.lru_cache
def _tile_cells(edge: int, ps_version: str) -> np.ndarray:
    grid = np.arange(edge * edge, dtype=np.int32).reshape(edge, edge)
    return (grid if ps_version == "v2" else grid.T).ravel()


@functools.lru_cache(maxsize=65_536)
def grid_of(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """(columns, rows) that ``tiling`` chooses for one image."""
    columns, rows = tiling.choose(np.array([[width, height]]))[0]
    return int(columns), int(rows)


def cut_tiles(image: np.ndarray, geometry: TileGeometry, out: np.ndarray) -> None:
    """Cuts an image of whole tiles into visual tokens: tiles row by row, tokens within a tile in ``ps_version`` order.

    Args:
      image: uint8 [rows * tile, columns * tile, 3].
      out: uint8 [rows * columns * tokens_per_tile, P, P, 3], contiguous, is filled.
    """
    tile, pixels, edge = geometry.tile_size, geometry.token_pixels, geometry.edge
    rows, columns = image.shape[0] // tile, image.shape[1] // tile
    grid = image.reshape(rows, edge, pixels, columns, edge, pixels, 3)
    axes = (0, 3, 1, 4, 2, 5, 6) if geometry.ps_version == "v2" else (0, 3, 4, 1, 2, 5, 6)
    out.reshape(rows, columns, edge, edge, pixels, pixels, 3)[:] = grid.transpose(axes)
