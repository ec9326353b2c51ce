"""The batch: what the data pipelines produce and the model consumes.

This module is the only definition of the batch's fields, of the tile geometry and of the meaning of the pixels. It
needs only NumPy, so that both sides can import it.

One *row* is a packed sequence with ``S = V + T`` slots. The first ``V`` slots are visual and the other
``T`` are text, whatever the order in which the tokens are read ("modality-major" layout). Which expert
a token takes is thus decided here, on the host. ``order`` gives the order in which the slots are read.

    slot       0 .. V-1                 V .. V+T-1
               visual tokens            text tokens
    sequence   position s of the row reads slot order[s]; samples follow one another, padding comes
               last (segment 0), and every slot appears exactly once in ``order``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from data_pipelines.errors import DataError

Batch = dict[str, np.ndarray]

# Pixels p of ``patches`` are given to the model as (p / 255 - mean) / std, by channel (RGB).
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class TileGeometry:
    """How a tile is cut into visual tokens: a property of the model that reads the batches, not of the data.

    Attributes:
      tile_size: edge of a tile in pixels.
      token_pixels: P, edge in pixels of the square that one visual token covers (28 for Mono-InternVL).
      ps_version: "v2" reads the tokens of a tile row by row, "v1" column by column.

    Raises DataError if tokens do not fill a tile.
    """

    tile_size: int = 448
    token_pixels: int = 28
    ps_version: Literal["v1", "v2"] = "v2"
    native: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.token_pixels < 1 or self.tile_size < 1 or self.tile_size % self.token_pixels:
            raise DataError(f"tile_size {self.tile_size} is not a multiple of token_pixels {self.token_pixels}")
        if self.ps_version not in ("v1", "v2"):
            raise DataError(f"ps_version is {self.ps_version!r}: it must be 'v1' or 'v2'")

    @property
    def edge(self) -> int:
        """Tokens along an edge of a tile."""
        return self.tile_size // self.token_pixels

    @property
    def tokens_per_tile(self) -> int:
        return self.edge**2


@dataclasses.dataclass(frozen=True)
class NativeGeometry(TileGeometry):
    """No tiles: an image is a grid of tokens whose size follows from its pixels. A tile is only a unit for budgets.

    A token's ``patch_cells`` then packs four bytes, from the highest: its row, its column, and the image's numbers of
    rows and columns, each minus one.
    """

    native: ClassVar[bool] = True
    MOST: ClassVar[int] = 256  # rows or columns of an image


def native_cells(columns: int, rows: int) -> np.ndarray:
    """``patch_cells`` of an image in native resolution, row by row: int32 [rows * columns]."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.uint32), np.uint32(columns))
    return (row << 24 | column << 16 | np.uint32((rows - 1) << 8 | columns - 1)).astype(np.uint32).view(np.int32)


def of_native_cells(cells: Any) -> tuple[Any, Any, Any, Any]:
    """(row, column, rows, columns) of ``native_cells``, a NumPy or JAX array."""
    row, column, rows, columns = (cells >> shift & 255 for shift in (24, 16, 8, 0))
    return row, column, rows + 1, columns + 1


DEFAULT_GEOMETRY = TileGeometry()  # of the public release


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Static sizes of a batch.

    Attributes:
      visual_tokens: V, visual slots of a row.
      text_tokens: T, text slots of a row.
      token_pixels: P, see ``TileGeometry``.
      boundary_block: 0 = as drawn above. Otherwise boundaries are ragged (see ``ragged``): each row has V slots in all,
        at most T of them text, and its own boundary at a multiple of this.
      source_ids: whether batches say which source each text slot comes from.
    """

    visual_tokens: int
    text_tokens: int
    token_pixels: int = 28
    boundary_block: int = 0
    source_ids: bool = False

    @property
    def sequence(self) -> int:
        """S = V + T; V where boundaries are ragged."""
        return self.visual_tokens if self.boundary_block else self.visual_tokens + self.text_tokens

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape (without the leading row axis B) and dtype of every field.

        patches        uint8   [V, P, P, 3]  raw RGB pixels of each visual token
        patch_cells    int32   [V]           cell of the token in its tile's grid, row by row; or ``native_cells``
        tokens         int32   [T]           input ids of the text slots
        targets        int32   [T]           id of the token that follows in the sequence
        loss_weights   float32 [T]           weight of the target's loss, 0 = not trained on
        order          int32   [S]           slot read at each sequence position (a permutation)
        positions      int32   [S]           position within the sample, in sequence order
        segments       int32   [S]           1, 2, ... = sample within the row, 0 = padding, in sequence order; the
                                             tokens of a sample follow one another
        sources        int32   [T]           ``source_ids`` only: 1, 2, ... = source as in the config, 0 = padding
        visual_slots   int32   []            ragged boundaries only: slots before this hold visual tokens, others text
        """
        v, t, s, p = self.visual_tokens, self.text_tokens, self.sequence, self.token_pixels
        sources = {"sources": ((t,), np.dtype(np.int32))} if self.source_ids else {}
        boundary = {"visual_slots": ((), np.dtype(np.int32))} if self.boundary_block else {}
        return {
            "patches": ((v, p, p, 3), np.dtype(np.uint8)),
            "patch_cells": ((v,), np.dtype(np.int32)),
            "tokens": ((t,), np.dtype(np.int32)),
            "targets": ((t,), np.dtype(np.int32)),
            "loss_weights": ((t,), np.dtype(np.float32)),
            "order": ((s,), np.dtype(np.int32)),
            "positions": ((s,), np.dtype(np.int32)),
            "segments": ((s,), np.dtype(np.int32)),
            **sources,
            **boundary,
        }

    def empty(self, rows: int, patches: np.ndarray | None = None) -> Batch:
        """A batch of ``rows`` rows that hold only padding. ``patches``, if given, is used unchanged for that field."""
        given = {} if patches is None else {"patches": patches}
        fields = {name: field for name, field in self.fields().items() if name not in given}
        batch = given | {name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}
        batch["order"][:] = np.arange(self.sequence, dtype=np.int32)
        return batch

    def check(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises a ValueError that names the field if ``batch`` does not match this spec."""
        fields = self.fields()
        if unknown := sorted(set(batch) ^ set(fields)):
            raise ValueError(f"batch fields missing or unknown: {unknown}; expected {sorted(fields)}")
        for name, (shape, dtype) in fields.items():
            array = batch[name]
            if tuple(array.shape[1:]) != shape or array.dtype != dtype:
                expected = f"{dtype}[B, {', '.join(map(str, shape))}]"
                raise ValueError(f"batch[{name!r}] is {array.dtype}{list(array.shape)}, expected {expected}")


def boundaries(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where each row's visual slots end and its text slots begin: int [B]."""
    rows, visual = batch["patch_cells"].shape
    return batch["visual_slots"] if "visual_slots" in batch else np.full(rows, visual)


def ragged(batch: Mapping[str, np.ndarray], slots: int, block: int) -> Batch:
    """The batch with a separate boundary in each row, for mixtures whose visual share is not known in advance.

    Args:
      batch: rows with V visual and T text slots, filled from the front.
      slots: S' of the result, a multiple of ``block``, at most V + T.
      block: slots that share an expert; each row's visual slots are rounded up to a multiple of it.

    Returns:
      The batch with ``order``, ``positions`` and ``segments`` of width ``slots``, and ``visual_slots`` int32 [B].

    Raises:
      ValueError: a row's tokens do not fit, or ``slots`` is not a multiple of ``block``.
    """
    visual, text = batch["patch_cells"].shape[1], batch["tokens"].shape[1]
    rows = len(batch["order"])
    if slots % block or slots > visual + text:
        raise ValueError(f"slots {slots} must be a multiple of block {block} and at most {visual + text}")
    real = batch["segments"] > 0
    ends = np.zeros(rows, np.int32)
    result = dict(batch) | {name: np.zeros((rows, slots), np.int32) for name in ("order", "positions", "segments")}
    for row in range(rows):
        used = batch["order"][row][real[row]]
        is_visual = used < visual
        ends[row] = -(-(int(used[is_visual].max(initial=-1)) + 1) // block) * block
        placed = np.where(is_visual, used, used - visual + ends[row])
        if len(used) and placed.max() >= slots:
            raise ValueError(f"row {row} needs {placed.max() + 1} slots, but there are {slots}")
        result["order"][row] = np.concatenate([placed, np.setdiff1d(np.arange(slots), placed)])
        for name in ("positions", "segments"):
            result[name][row, : len(placed)] = batch[name][row][real[row]]
    return result | {"visual_slots": ends}
