"""Sources made of shards with indices: one table of all usable samples, and bytes fetched on demand.

The table has the columns of shard_index.py that reading and planning need, for the samples that are offered, shard
after shard. Small tables live in memory; from TABLE_ROWS samples on they are written to the cache folder once and
mapped, so that opening a source of hundreds of millions of samples takes seconds and processes share its pages.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import storage
from data_pipelines.captions import Captions
from data_pipelines.errors import BadSample, DataError
from data_pipelines.records import Record, parse
from data_pipelines.shard_index import ShardIndex, Strings

TABLE_ROWS = 1 << 20
VERSION = 1  # of saved tables

_SAMPLE = ("image_count", "text_offset", "text_length", "text_form")
_IMAGE = ("image_offset", "image_length", "image_size")
_STRINGS = ("keys", "image_name", "text_name")


@dataclasses.dataclass(frozen=True)
class RawSample:
    """What every source returns: encoded images and what is said about them.

    Attributes:
      key: unique within the source: "SHARD/KEY" or "FILE:LINE".
      images: encoded images in order of appearance.
      caption: of an image-text pair.
      conversations: turns (speaker, text), the speaker being "human", "gpt" or "system".
      text: plain text.
    """

    key: str
    images: tuple[bytes, ...] = ()
    caption: str | None = None
    conversations: tuple[tuple[str, str], ...] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a source.

    Attributes:
      path: where it lies.
      name: what it is called in keys.
      options: of the kind's ``scan``.
    """

    path: str
    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of one shard that are offered.

    Attributes:
      index: the shard's index.
      rows: int64 [k] rows of the index, in order; a row occurs again where it is offered again.
      captions: int64 [k] rows of the joined captions, -1 = the sample's own text; None without a join.
    """

    index: ShardIndex
    rows: np.ndarray
    captions: np.ndarray | None = None


class Table:
    """Columns of the offered samples; see the module's docstring. ``arrays`` are in memory or mapped."""

    def __init__(self, arrays: Mapping[str, np.ndarray], folder: Path | None = None):
        self.arrays = dict(arrays)
        self.folder = folder

    @classmethod
    def build(cls, selections: Sequence[Selection]) -> Table:
        def gather(name: str, rows: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([s.index.columns[name][r] for s, r in zip(selections, rows)])

        rows = [s.rows for s in selections]
        images = [_images_of(s.index, s.rows) for s in selections]
        arrays = {name: gather(name, rows) for name in _SAMPLE} | {name: gather(name, images) for name in _IMAGE}
        arrays["row"] = np.concatenate(rows)
        arrays["shard_end"] = np.cumsum([len(r) for r in rows], dtype=np.int64)
        arrays["image_end"] = np.cumsum(arrays["image_count"], dtype=np.int64)
        arrays["repeat"] = np.concatenate([_occurrence(r) for r in rows])
        if any(s.captions is not None for s in selections):
            arrays["caption_row"] = np.concatenate([s.captions for s in selections])
        for name in _STRINGS:
            chosen = images if name == "image_name" else rows
            parts = [getattr(s.index, name) for s in selections]
            if any(len(part) for part in parts):
                strings = Strings.concatenate([part.take(r) for part, r in zip(parts, chosen)])
                arrays[name], arrays[name + "_end"] = strings.data, strings.ends
        if not arrays["repeat"].any():
            del arrays["repeat"]
        return cls(arrays)

    def __len__(self) -> int:
        return len(self.arrays["row"])

    def strings(self, name: str) -> Strings:
        return Strings(self.arrays[name], self.arrays[name + "_end"])

    def save(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Writes the table (whole or not at all) for ``load``; another process may do the same at the same time."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
        try:
            for name, array in self.arrays.items():
                np.save(temporary / f"{name}.npy", array)
            (temporary / "table.json").write_text(json.dumps({**header, "arrays": list(self.arrays)}))
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> tuple[Table, dict[str, Any]]:
        """(mapped table, the header given to ``save``). Raises OSError or ValueError if it is not there whole."""
        header = json.loads((folder / "table.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in header["arrays"]}
        return cls(arrays, folder), header

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder} if self.folder else {"folder": None, "arrays": self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self.arrays = Table.load(self.folder)[0].arrays if self.folder else state["arrays"]


def _images_of(index: ShardIndex, rows: np.ndarray) -> np.ndarray:
    """Rows of the image columns that belong to the samples ``rows``."""
    counts = index.columns["image_count"].astype(np.int64)
    ends = np.cumsum(counts)
    return _ranges((ends - counts)[rows], counts[rows])


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenation of ``arange(start, start + count)``."""
    counts = counts.astype(np.int64)
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


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


class IndexedSource:
    """Random access to the samples of a table; the formats' subclasses say how images and texts are fetched.

    This class itself reads both as byte ranges of the shard.
    """

    key_separator = "/"

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        table: Table,
        fingerprint: str,
        dropped: Mapping[str, int],
        captions: Captions | None = None,
    ):
        self.name = name
        self.shards = list(shards)
        self._table = table
        self._fingerprint = fingerprint
        self._dropped = dict(dropped)
        self._captions = captions
        self._ends: list[int] = table.arrays["shard_end"].tolist()

    @functools.cached_property
    def _keys(self) -> Strings:
        return self._table.strings("keys")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_keys"}  # part of the table already

    def __len__(self) -> int:
        return len(self._table)

    def fingerprint(self) -> str:
        return self._fingerprint

    def dropped(self) -> dict[str, int]:
        return dict(self._dropped)

    def shard_ranges(self) -> np.ndarray:
        """int64 [shards + 1]: samples of shard s are ranges[s] .. ranges[s + 1] - 1 (for reading in long runs)."""
        return np.concatenate([[0], self._table.arrays["shard_end"]])

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        arrays = self._table.arrays
        counts = np.asarray(arrays["image_count"][indices])
        return counts, np.asarray(arrays["image_size"][_ranges(arrays["image_end"][indices] - counts, counts)])

    def key(self, index: int) -> str:
        """The key of sample ``index``; one offered for the second time ends in "#2", and so on."""
        return self._key(self._shard(index), int(index))

    def _key(self, shard: Shard, index: int) -> str:
        key = shard.name + self.key_separator + self._keys[index]
        times = int(self._table.arrays["repeat"][index]) + 1 if "repeat" in self._table.arrays else 1
        return key if times == 1 else f"{key}#{times}"

    def read(self, index: int) -> RawSample:
        return self._read(int(index), images=True)

    def read_text(self, index: int) -> RawSample:
        return self._read(int(index), images=False)

    def read_images(self, index: int) -> tuple[bytes, ...]:
        """The images alone, of formats where the text does not name them (all but jsonl). Raises BadSample."""
        return self._read(int(index), images=True, text=False).images

    def _read(self, index: int, images: bool, text: bool = True) -> RawSample:
        shard = self._shard(index)
        key = self._key(shard, index)
        try:
            record, data = self._fetch(shard, index, images, text)
        except BadSample as error:
            raise BadSample(error.reason, key, error.detail) from None
        except (OSError, DataError) as error:
            raise BadSample("unreadable", key, str(error)) from None
        return RawSample(key, data, record.caption, record.conversations, record.text)

    def _fetch(self, shard: Shard, index: int, images: bool, text: bool) -> tuple[Record, tuple[bytes, ...]]:
        """What is asked for of a sample; an empty record or no images for what is not. Raises BadSample."""
        record = self._joined(shard, index) if text else Record()
        return record, self._images(shard, index, record) if images else ()

    def _joined(self, shard: Shard, index: int) -> Record:
        """The record, its text replaced by the joined caption if there is one."""
        row = self._caption_row(index)
        return self._record(shard, index) if row < 0 else self._captioned(shard, index, self._captions[row])

    # What formats replace:

    def _captioned(self, shard: Shard, index: int, caption: str) -> Record:
        return Record(caption=caption)

    def _record(self, shard: Shard, index: int) -> Record:
        return self._parsed(shard, index, *self._bytes(shard, [self._text_place(index)]))

    def _images(self, shard: Shard, index: int, record: Record) -> tuple[bytes, ...]:
        return tuple(self._bytes(shard, self._image_places(index)))

    # What they use:

    def _caption_row(self, index: int) -> int:
        """Row of the joined caption, -1 = none."""
        arrays = self._table.arrays
        return int(arrays["caption_row"][index]) if "caption_row" in arrays else -1

    def _parsed(self, shard: Shard, index: int, data: bytes) -> Record:
        form = int(self._table.arrays["text_form"][index])
        return parse(form, data, shard.options.get("caption_key") or "caption")

    def _image_range(self, index: int) -> range:
        end = int(self._table.arrays["image_end"][index])
        return range(end - int(self._table.arrays["image_count"][index]), end)

    def _image_places(self, index: int) -> list[tuple[int, int]]:
        """(offset, length) of the images."""
        offsets, lengths = self._table.arrays["image_offset"], self._table.arrays["image_length"]
        return [(int(offsets[i]), int(lengths[i])) for i in self._image_range(index)]

    def _text_place(self, index: int) -> tuple[int, int]:
        return int(self._table.arrays["text_offset"][index]), int(self._table.arrays["text_length"][index])

    def _bytes(self, shard: Shard, places: Sequence[tuple[int, int]]) -> list[bytes]:
        found = storage.blob(shard.path).read_all(places)
        for data, (offset, length) in zip(found, places):
            if len(data) != length:
                raise BadSample("truncated", detail=f"{len(data)} of {length} bytes at byte {offset}")
        return found

    def _shard(self, index: int) -> Shard:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"sample {index} of {len(self)} in source {self.name}")
        return self.shards[bisect.bisect_right(self._ends, index)]
