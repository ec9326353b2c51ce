"""Sources made of shards with indices: one table of all usable samples, and bytes fetched on demand.

The table has the columns of shard_index.py that reading and planning need, for the samples that are offered, shard
after shard. Small tables live in memory; from TABLE_ROWS samples on they are written to the cache folder once, piece by
piece, and mapped: opening a source of hundreds of millions of samples takes seconds and little memory, and processes
share its pages.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records.text_record import Record, parse
from data_pipelines.sources.captions import Captions
from data_pipelines.sources.shard_index import ShardIndex, Strings

TABLE_ROWS = 1 << 20
VERSION = 3  # of saved tables

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

    def where(self, chosen: np.ndarray) -> Selection:
        """Those that ``chosen`` (bool [k] or int [m]) picks."""
        return Selection(self.index, self.rows[chosen], None if self.captions is None else self.captions[chosen])


class Table:
    """Columns of the offered samples; see the module's docstring. ``arrays`` are in memory or mapped."""

    def __init__(self, arrays: Mapping[str, np.ndarray], folder: Path | None = None):
        self.arrays = dict(arrays)
        self.folder = folder

    @classmethod
    def build(cls, selections: Iterable[Selection], folder: Path | None = None) -> Table:
        """The table of all selections, which are gone through once.

        ``folder``: made to collect the columns in from TABLE_ROWS samples on; None = in memory however many.
        """
        columns = _Columns(folder)
        for selection in selections:
            columns.add(selection)
        return cls(columns.arrays(), folder if columns.spilled else None)

    def __len__(self) -> int:
        return len(self.arrays["row"])

    def strings(self, name: str) -> Strings:
        return Strings(self.arrays[name], self.arrays[name + "_end"])

    def save(self, folder: Path, header: Mapping[str, Any]) -> Table:
        """Moves a table whose columns were collected in a folder to ``folder``, whole or not at all; returns it there.

        Another process may do the same at the same time.
        """
        assert self.folder is not None
        shapes = {name: (array.dtype.str, array.shape) for name, array in self.arrays.items()}
        (self.folder / "table.json").write_text(json.dumps({**header, "arrays": shapes}))
        try:
            os.rename(self.folder, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
        return Table.load(folder)[0]

    @classmethod
    def load(cls, folder: Path) -> tuple[Table, dict[str, Any]]:
        """(mapped table, the header given to ``save``). Raises OSError or ValueError if it is not there whole."""
        header = json.loads((folder / "table.json").read_text())
        arrays = {name: _mapped(folder / name, *about) for name, about in header["arrays"].items()}
        return cls(arrays, folder), header

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder} if self.folder else {"folder": None, "arrays": self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self.arrays = Table.load(self.folder)[0].arrays if self.folder else state["arrays"]


def _mapped(file: Path, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """An array kept as plain bytes."""
    if 0 in shape:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    return np.memmap(file, dtype, "r", shape=tuple(shape))


class _Columns:
    """Columns that grow by one shard at a time: in memory, and from TABLE_ROWS samples on in files of a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._pending: dict[str, list[np.ndarray]] = {}
        self._rows = self._pending_rows = self._images = 0
        self._characters = dict.fromkeys(_STRINGS, 0)
        self._unused = {"repeat", "caption_row"}  # as long as no shard has anything in them
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}  # of what is in files
        self.spilled = False

    def add(self, selection: Selection) -> None:
        index, rows = selection.index, selection.rows
        images = _images_of(index, rows)
        self._append({name: index.columns[name][rows] for name in _SAMPLE})
        self._append({name: index.columns[name][images] for name in _IMAGE})
        repeat = _occurrence(rows)
        joined = np.full(len(rows), -1, np.int64) if selection.captions is None else selection.captions
        self._append({"row": rows, "repeat": repeat, "caption_row": joined})
        self._unused -= ({"repeat"} if repeat.any() else set()) | ({"caption_row"} if (joined >= 0).any() else set())
        for name in _STRINGS:
            all_of_shard = getattr(index, name)
            chosen = images if name == "image_name" else rows
            strings = all_of_shard.take(chosen) if len(all_of_shard) else Strings.of([b""] * len(chosen))
            self._append({name: strings.data, name + "_end": strings.ends + self._characters[name]})
            self._characters[name] += len(strings.data)
        ends = np.cumsum(index.columns["image_count"][rows], dtype=np.int64) + self._images
        self._rows, self._images = self._rows + len(rows), self._images + len(images)
        self._append({"shard_end": np.array([self._rows], np.int64), "image_end": ends})
        self._pending_rows += len(rows)
        if self._folder is not None and self._pending_rows >= TABLE_ROWS:
            self._spill()

    def _append(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            self._pending.setdefault(name, []).append(array)

    def _spill(self) -> None:
        """Moves what is pending to the ends of the files."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        self.spilled, self._pending_rows = True, 0
        for name, parts in self._pending.items():
            array = np.concatenate(parts)
            with (self._folder / name).open("ab") as file:
                array.tofile(file)
            length = self._shapes[name][1][0] if name in self._shapes else 0
            self._shapes[name] = array.dtype.str, (length + len(array), *array.shape[1:])
        self._pending.clear()

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns that hold anything; call it once."""
        if self.spilled:
            self._spill()
            arrays = {name: _mapped(self._folder / name, *about) for name, about in self._shapes.items()}
        else:
            arrays = {name: np.concatenate(parts) for name, parts in self._pending.items()}
        self._unused |= {part for name in _STRINGS if not self._characters[name] for part in (name, name + "_end")}
        return {name: array for name, array in arrays.items() if name not in self._unused}


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
        problems: Mapping[str, Sequence[str]] | None = None,
    ):
        self.name = name
        self.shards = list(shards)
        self._table = table
        self._fingerprint = fingerprint
        self._dropped = dict(dropped)
        self._captions = captions
        self.is_remote = any(storage.is_remote(shard.path) for shard in self.shards)
        self._problems = {path: list(found) for path, found in (problems or {}).items()}
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

    def problems(self) -> dict[str, list[str]]:
        return {path: list(found) for path, found in self._problems.items()}

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
