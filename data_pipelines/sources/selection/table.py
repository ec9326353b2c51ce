"""The table of the samples that a source offers: the columns of their indices, shard after shard.

Small tables are in memory; from TABLE_ROWS samples on they are written to the cache folder once, piece by piece, and
memory-mapped, so that opening a source of hundreds of millions of samples takes seconds and little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.sources.indices.columns import Columns, GrowingColumns, Strings, ranges
from data_pipelines.sources.indices.shard_index import ShardIndex
from data_pipelines.sources.selection.select import Selection

TABLE_ROWS = 1 << 20
VERSION = 9  # of tables on disk

_SAMPLE = ("image_count", "text_offset", "text_length", "text_form")
_IMAGE = ("image_offset", "image_length", "image_size", "image_frame")
_STRINGS = ("keys", "image_name", "text_name")


class TableBuilder:
    """Collects the selections of a source's shards, one after the other."""

    def __init__(self, make_folder: Callable[[], Path] | None = None):
        """make_folder: makes the empty folder that a large table is written to; None = always in memory."""
        self._columns = GrowingColumns(TABLE_ROWS, make_folder)
        self._rows = self._images = 0
        self._characters = dict.fromkeys(_STRINGS, 0)
        self._unused = {"repeat", "caption_row", "image_frame"}  # as long as no shard uses them

    def add(self, selection: Selection) -> None:
        index, rows = selection.index, selection.rows
        images = _images_of(index, rows)
        repeat = _occurrence(rows)
        joined = np.full(len(rows), -1, np.int64) if selection.captions is None else selection.captions
        frames = index.columns["image_frame"][images]
        filled = {"repeat": repeat.any(), "caption_row": (joined >= 0).any(), "image_frame": frames.any()}
        self._unused -= {name for name, is_filled in filled.items() if is_filled}
        image_ends = np.cumsum(index.columns["image_count"][rows], dtype=np.int64) + self._images
        self._rows, self._images = self._rows + len(rows), self._images + len(images)
        arrays = {
            **{name: index.columns[name][rows] for name in _SAMPLE},
            **{name: index.columns[name][images] for name in _IMAGE},
            "row": rows,
            "repeat": repeat,
            "caption_row": joined,
            "image_end": image_ends,
            "shard_end": np.array([self._rows], np.int64),
        }
        for name in _STRINGS:
            arrays |= self._strings(name, getattr(index, name), images if name == "image_name" else rows)
        self._columns.extend(arrays, len(rows))

    def _strings(self, name: str, strings: Strings, chosen: np.ndarray) -> dict[str, np.ndarray]:
        taken = strings.take(chosen) if len(strings) else Strings.of([b""] * len(chosen))
        arrays = {name: taken.data, f"{name}_end": taken.ends + self._characters[name]}
        self._characters[name] += len(taken.data)
        return arrays

    def finish(self, header: Mapping[str, Any]) -> Columns | None:
        """The table in memory; None if it has been written to the folder, complete with ``header``."""
        empty = {part for name in _STRINGS if not self._characters[name] for part in (name, f"{name}_end")}
        return self._columns.finish(header, self._unused | empty)


def _images_of(index: ShardIndex, rows: np.ndarray) -> np.ndarray:
    """Rows of the image columns that belong to the samples ``rows``."""
    counts = index.columns["image_count"].astype(np.int64)
    ends = np.cumsum(counts)
    return ranges((ends - counts)[rows], counts[rows])


def _occurrence(rows: np.ndarray) -> np.ndarray:
    """int32: how often each row has occurred before."""
    if not len(rows) or np.all(np.diff(rows) > 0):
        return np.zeros(len(rows), np.int32)
    order = np.argsort(rows, kind="stable")
    first = np.concatenate([[True], np.diff(rows[order]) > 0])
    starts = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    result = np.empty(len(rows), np.int32)
    result[order] = np.arange(len(rows)) - starts
    return result
