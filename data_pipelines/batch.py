"""The batch: what the data pipelines produce and the model consumes.

This module is the single home of the batch's fields. It needs nothing but NumPy, so that both
sides can import it (``mono_jax`` imports this module of ``data_pipelines`` and no other).

One *row* is a packed sequence with ``S = V + T`` slots. The first ``V`` slots are visual, the other
``T`` are text, whatever the order in which the tokens are read ("modality-major" layout): which
expert a token takes is thus decided here, on the host. ``order`` says how the slots are read.

    slot       0 .. V-1                 V .. V+T-1
               visual tokens            text tokens
    sequence   position s of the row reads slot order[s]; samples lie one behind the other, padding
               comes last (segment 0), and every slot appears exactly once in ``order``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

Batch = dict[str, np.ndarray]

# Pixels p of ``patches`` are given to the model as (p / 255 - mean) / std, by channel (RGB).
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Static sizes of a batch.

    Attributes:
      visual_tokens: V, visual slots of a row.
      text_tokens: T, text slots of a row.
      token_pixels: P, edge in pixels of the square that one visual token covers (28 for Mono-InternVL).
      boundary_block: 0 = as drawn above. Else rows are elastic (see `elastic`): of V slots in all, at most T of them
        text, each with a boundary of its own at a multiple of this.
    """

    visual_tokens: int
    text_tokens: int
    token_pixels: int = 28
    boundary_block: int = 0

    @property
    def sequence(self) -> int:
        """S = V + T; V in elastic rows."""
        return self.visual_tokens if self.boundary_block else self.visual_tokens + self.text_tokens

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape (without the leading row axis B) and dtype of every field.

        patches        uint8   [V, P, P, 3]  raw RGB pixels of each visual token
        patch_cells    int32   [V]           cell of the token in its tile's grid, row by row
        tokens         int32   [T]           input ids of the text slots
        targets        int32   [T]           id of the token that follows in the sequence
        loss_weights   float32 [T]           weight of the target's loss, 0 = not trained on
        order          int32   [S]           slot read at each sequence position (a permutation)
        positions      int32   [S]           position within the sample, in sequence order
        segments       int32   [S]           1, 2, ... = sample within the row, 0 = padding, in sequence order
        visual_slots   int32   []            elastic rows only: slots before this hold visual tokens, the others text
        """
        v, t, s, p = self.visual_tokens, self.text_tokens, self.sequence, self.token_pixels
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
            **boundary,
        }

    def empty(self, rows: int, patches: np.ndarray | None = None) -> Batch:
        """A batch of ``rows`` rows that hold only padding. ``patches``, if given, is taken as it is for that field."""
        given = {} if patches is None else {"patches": patches}
        fields = {name: field for name, field in self.fields().items() if name not in given}
        batch = given | {name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}
        batch["order"][:] = np.arange(self.sequence, dtype=np.int32)
        return batch

    def check(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError that names the field if ``batch`` does not fit this spec."""
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


def ragged(batch: Mapping[str, np.ndarray], slots: int, tile: int) -> Batch:
    """The batch with a boundary of its own in each row, for mixes whose visual share is not known in advance.

    Args:
      batch: rows with V visual and T text slots, filled from the front.
      slots: S' of the result, a multiple of ``tile``, at most V + T.
      tile: slots that share an expert; each row's visual slots are rounded up to a multiple.

    Returns:
      The batch with ``order``, ``positions`` and ``segments`` of width ``slots``, and ``visual_slots`` int32 [B].

    Raises:
      ValueError: a row's tokens do not fit, or ``slots`` is no multiple of ``tile``.
    """
    visual, text = batch["patch_cells"].shape[1], batch["tokens"].shape[1]
    rows = len(batch["order"])
    if slots % tile or slots > visual + text:
        raise ValueError(f"slots {slots} must be a multiple of tile {tile} and at most {visual + text}")
    real = batch["segments"] > 0
    ends = np.zeros(rows, np.int32)
    result = dict(batch) | {name: np.zeros((rows, slots), np.int32) for name in ("order", "positions", "segments")}
    for row in range(rows):
        taken = batch["order"][row][real[row]]
        seen = taken < visual
        ends[row] = -(-(int(taken[seen].max(initial=-1)) + 1) // tile) * tile
        placed = np.where(seen, taken, taken - visual + ends[row])
        if len(taken) and placed.max() >= slots:
            raise ValueError(f"row {row} needs {placed.max() + 1} slots, there are {slots}")
        result["order"][row] = np.concatenate([placed, np.setdiff1d(np.arange(slots), placed)])
        for name in ("positions", "segments"):
            result[name][row, : len(placed)] = batch[name][row][real[row]]
    return result | {"visual_slots": ends}
