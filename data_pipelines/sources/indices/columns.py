"""Columns: arrays by name, in memory or as plain bytes in the files of a folder, which are memory-mapped.

Tables of samples and of captions may be larger than memory; mapped columns use none, and processes share their pages.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.io.digests import with_checksum, without_checksum
from data_pipelines.io.storage import storage_error

_HEADER = "columns.json"
_MOST_CHECKED = 1 << 32  # bytes that are read to verify checksums
_DAMAGED = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
)
_log = logging.getLogger(__name__)


class Strings:
    """n byte strings in one buffer (uint8); ``ends`` (int64 [n]) are their ends. ``strings[i]`` decodes one."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Strings:
        """The column of ``items``."""
        lengths = np.array([len(item) for item in items], np.int64)
        return cls(np.frombuffer(b"".join(items), np.uint8), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def take(self, rows: np.ndarray) -> Strings:
        """The strings of ``rows`` (int64 [k]), in that order."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64) if len(self.ends) else self.ends
        lengths = (self.ends - starts)[rows]
        return Strings(self.data[ranges(starts[rows], lengths)], np.cumsum(lengths, dtype=np.int64))


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenation of all ``arange(start, start + count)``, int64."""
    counts = counts.astype(np.int64)
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


class Columns(Mapping[str, np.ndarray]):
    """Arrays by name. Mapped columns are pickled as the path of their folder."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        folder: Path | None = None,
        checksums: Mapping[str, int] | None = None,
    ):
        """checksums: of the files of mapped columns."""
        self._arrays = dict(arrays)
        self._folder, self._checksums = folder, dict(checksums or {})

    @classmethod
    def load_whole(cls, folder: Path) -> tuple[Columns, dict[str, Any]] | None:
        """Like ``load``; None if there is no intact table. Damage is logged; above 4 GiB only sizes are compared.

        Raises StorageError if the folder cannot be read.
        """
        try:
            columns, header = cls.load(folder)
            columns._check()
        except _DAMAGED as error:
            if folder.exists():
                _log.warning("%s: damaged (%s); it is rebuilt", folder, error)
            return None
        except OSError as error:
            raise storage_error(str(folder), error) from None
        return columns, header

    def _check(self) -> None:
        """Raises ValueError if any bit of the files has changed."""
        if sum(array.nbytes for array in self._arrays.values()) > _MOST_CHECKED:
            return
        for name, array in self._arrays.items():
            if array.size and _crc(array) != self._checksums[name]:
                raise ValueError(f"the checksum of column {name} does not match")

    @classmethod
    def load(cls, folder: Path) -> tuple[Columns, dict[str, Any]]:
        """(mapped columns, the header given to ``ColumnFiles.finish``). Raises OSError, ValueError or KeyError."""
        header = json.loads(without_checksum((folder / _HEADER).read_bytes()))
        arrays = {name: _mapped(folder / name, *layout) for name, layout in header["arrays"].items()}
        return cls(arrays, folder, header["checksums"]), header["header"]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def strings(self, name: str) -> Strings:
        """The column of strings whose bytes are in ``name`` and whose ends are in ``name_end``."""
        return Strings(self[name], self[f"{name}_end"])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder} if self._folder else {"folder": None, "arrays": self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._folder, self._checksums = state["folder"], {}
        self._arrays = Columns.load(self._folder)[0]._arrays if self._folder else state["arrays"]


def _mapped(file: Path, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if 0 in shape:
        return np.zeros(shape, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, "r", shape=tuple(shape))


def _crc(array: np.ndarray, crc: int = 0) -> int:
    """CRC-32 of an array's bytes, continued from ``crc``."""
    return zlib.crc32(memoryview(np.ascontiguousarray(array)).cast("B"), crc) if array.size else crc


class ColumnFiles:
    """Columns that are written piece by piece to the files of a folder."""

    def __init__(self, folder: Path):
        """folder: must exist and be empty."""
        self._folder = folder
        self._layouts: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._checksums: dict[str, int] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        """Adds ``array`` at the end of a column. Raises OSError."""
        array = np.ascontiguousarray(array)
        with (self._folder / name).open("ab") as file:
            array.tofile(file)
        self._checksums[name] = _crc(array, self._checksums.get(name, 0))
        length = self._layouts[name][1][0] if name in self._layouts else 0
        self._layouts[name] = array.dtype.str, (length + len(array), *array.shape[1:])

    def finish(self, header: Mapping[str, Any], unused: Collection[str] = ()) -> None:
        """Writes what ``Columns.load`` needs, and removes the files of ``unused`` columns."""
        for name in unused:
            (self._folder / name).unlink(missing_ok=True)
        layouts = {name: layout for name, layout in self._layouts.items() if name not in unused}
        text = json.dumps({"header": header, "arrays": layouts, "checksums": self._checksums})
        (self._folder / _HEADER).write_bytes(with_checksum(text.encode()))


class GrowingColumns:
    """Columns that grow by some rows at a time: in memory, and above ``limit`` pending rows in files."""

    def __init__(self, limit: int, make_folder: Callable[[], Path] | None = None):
        """make_folder: makes the empty folder for the files when they are needed; None = always in memory."""
        self._limit, self._make_folder = limit, make_folder
        self._pending: dict[str, list[np.ndarray]] = {}
        self._pending_rows = 0
        self._files: ColumnFiles | None = None

    def extend(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        """Adds pieces of columns that belong to ``rows`` further rows."""
        for name, array in arrays.items():
            self._pending.setdefault(name, []).append(array)
        self._pending_rows += rows
        if self._make_folder is not None and self._pending_rows >= self._limit:
            self._files = self._files or ColumnFiles(self._make_folder())
            self._spill(self._files)

    def _spill(self, files: ColumnFiles) -> None:
        for name, parts in self._pending.items():
            files.append(name, np.concatenate(parts))
        self._pending.clear()
        self._pending_rows = 0

    def finish(self, header: Mapping[str, Any], unused: Collection[str] = ()) -> Columns | None:
        """All columns except ``unused`` ones, in memory; None if they are in files, complete with ``header``."""
        if self._files is None:
            return Columns({name: np.concatenate(p) for name, p in self._pending.items() if name not in unused})
        self._spill(self._files)
        self._files.finish(header, unused)
        return None
