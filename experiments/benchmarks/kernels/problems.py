"""What the kernel benchmark measures, and in what order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.devices import device_key
from pallas_kernels.experts.block_map import num_blocks
from pallas_kernels.experts.contract import FfnWeights, Problem

DIRECTIONS = ("forward", "both", "visual")  # both, visual: forward and backward, training these experts


class Shape(NamedTuple):
    """Widths of one model: residual stream, hidden layer of the FFN, output of the QKV projection."""

    d: int
    ff: int
    qkv: int


SHAPES = {"2b": Shape(2048, 8192, 4096), "7b": Shape(4096, 14336, 6144), "tiny": Shape(128, 256, 256)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem.

    Attributes:
      op: "ffn" (SwiGLU of each token's expert) or "qkv" (projection of the visual attention experts).
      shape: key of SHAPES.
      rows: tokens N.
      visual_share: percent of the tokens that are visual.
      interleaving: percent of the tokens that have left their run (0: one visual run, then text).
      dtype: of tokens and weights.
      tile: rows per block of the grouped forms (stored results use this name).
    """

    op: str
    shape: str
    rows: int
    visual_share: int
    interleaving: int
    dtype: str
    tile: int

    @property
    def d(self) -> int:
        """Input width."""
        return SHAPES[self.shape].d

    @property
    def width(self) -> int:
        """Hidden width of the FFN, output width of the projection."""
        return SHAPES[self.shape].ff if self.op == "ffn" else SHAPES[self.shape].qkv

    @property
    def out(self) -> int:
        """Output width."""
        return self.d if self.op == "ffn" else self.width

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return round(self.rows * self.visual_share / 100)

    @property
    def kernel_op(self) -> str:
        """Name of the operation in ``pallas_kernels``."""
        return {"ffn": "ffn", "qkv": "matmul"}[self.op]

    @property
    def problem(self) -> Problem:
        """The problem for which implementations are asked for support and tuning tables are searched."""
        grouped = num_blocks(self.rows, self.tile) * self.tile
        return Problem(self.kernel_op, grouped, self.tile, self.d, self.width, self.dtype, device_key())

    def mask(self) -> np.ndarray:
        """bool [N], True = visual."""
        rng = np.random.default_rng(0)
        mask = np.arange(self.rows) < self.visual
        moved = rng.permutation(self.rows)[: round(self.rows * self.interleaving / 100)]
        mask[moved] = mask[rng.permutation(moved)]
        return mask

    def weight_shapes(self) -> Any:
        """Shapes of one expert's weights: an FfnWeights, or one shape."""
        d, width = self.d, self.width
        return FfnWeights((d, width), (d, width), (width, d)) if self.op == "ffn" else (d, width)


class Point(NamedTuple):
    """A setting, which rows of the table it asks for, and in which directions."""

    setting: Setting
    wanted: Callable[[str], bool]
    directions: tuple[str, ...] = DIRECTIONS


ALL_N = (1024, 2048, 4096, 8192, 16384, 32768)
MIXED = (0, 10, 50, 90, 100)


def _any_row(row: str) -> bool:
    return True


def _arranged(row: str) -> bool:
    """Rows whose tokens come grouped: their times do not depend on the order of the tokens."""
    return " " not in row and row != "gather_scatter"


def _as_they_come(row: str) -> bool:
    """Rows whose tokens come in sequence order."""
    return not _arranged(row)


def points(tile: int, dtype: str) -> Iterator[Point]:
    """All problems, most informative first; some come twice, with more rows the second time.

    A device that is lent for a short time may go back anywhere in the list. First comes the FFN of the 2B model at two
    sizes, then over the interleaving and over N; then the projection, the visual share, and the 7B model; finally the
    rest of the grid.
    """
    make = functools.partial(Setting, dtype=dtype, tile=tile)
    both_models = (("ffn", "2b"), ("qkv", "2b"), ("ffn", "7b"), ("qkv", "7b"))
    for n in (4096, 16384):
        yield Point(make("ffn", "2b", n, 50, 0), _arranged, ("forward", "both"))
    for mixed in MIXED:
        yield Point(make("ffn", "2b", 4096, 50, mixed), _as_they_come, ("forward", "both"))
    for n in (4096, 16384, 1024, 2048, 8192, 32768):
        yield Point(make("ffn", "2b", n, 50, 0), _arranged)
    for n in (4096, 16384):
        yield Point(make("qkv", "2b", n, 50, 0), _arranged)
    for n in (4096, 16384):
        for share in (90, 0, 100):
            yield Point(make("ffn", "2b", n, share, 0), _arranged)
    for op, shape in (("ffn", "7b"), ("qkv", "7b")):
        for n in (4096, 16384):
            yield Point(make(op, shape, n, 50, 0), _arranged, ("forward", "both"))
    for mixed in MIXED:
        yield Point(make("ffn", "2b", 16384, 50, mixed), _as_they_come, ("forward", "both"))
    for mixed in (1, 3):  # where the paper's form may break even
        yield Point(make("ffn", "2b", 4096, 50, mixed), _as_they_come, ("forward", "both"))
    for op, shape in both_models:
        for n in ALL_N:
            for share in (50, 90, 0, 100):
                yield Point(make(op, shape, n, share, 0), _any_row)
        for mixed in MIXED:
            for n in (4096, 16384):
                yield Point(make(op, shape, n, 50, mixed), _any_row)


def rehearsal(tile: int, dtype: str) -> Iterator[Point]:
    """Tiny problems that exercise every row, both operations and all directions once."""
    make = functools.partial(Setting, shape="tiny", dtype=dtype, tile=tile)
    for op in ("ffn", "qkv"):
        half = make(op, rows=2 * tile, visual_share=50, interleaving=0)
        yield Point(half, _arranged)
        yield Point(half, _as_they_come, ("both",))
    yield Point(make("ffn", rows=tile + 3, visual_share=100, interleaving=0), _arranged, ("forward",))
    yield Point(make("ffn", rows=2 * tile, visual_share=50, interleaving=100), _as_they_come, ("both",))
