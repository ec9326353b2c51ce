"""Captions joined to existing shards by key, such as the synthetic ones of stage S1.2 (parquet or JSONL files).

The files are turned once into a table in the cache folder that is mapped, not loaded: a few hundred million captions
need disk space there, not memory.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io import storage
from data_pipelines.records.scripts import script_of
from data_pipelines.sources.shard_index import Strings, hash64

_ARRAYS = {"hash": "u8", "start": "i8", "length": "i4", "chars": "i4", "text_hash": "u8", "script": "u1"}
_VERSION = "3"  # of the table
_MAX_LINE = 1 << 26  # bytes of a line, which may hold many captions; a longer one is not read
_log = logging.getLogger(__name__)
_BUFFERED = 1 << 16  # captions taken together while the table is made


class Captions:
    """Captions by the hash of their key, sorted by it; ``captions[row]`` is a caption's text.

    ``broken``: for each file with lines that cannot be read, their number and the number of the first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.hash, self.chars, self.text_hash, self.script = (
            self._arrays[name] for name in ("hash", "chars", "text_hash", "script")
        )
        self._texts = np.memmap(folder / "texts", np.uint8, "r") if len(self.hash) else np.zeros(0, np.uint8)
        about = json.loads((folder / "captions.json").read_text())
        self.digest: str = about["digest"]
        self.broken: dict[str, list[int]] = about["broken"]

    def __len__(self) -> int:
        return len(self.hash)

    def __getitem__(self, row: int) -> str:
        start = int(self._arrays["start"][row])
        return self._texts[start : start + int(self._arrays["length"][row])].tobytes().decode()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])

    def find(self, shard: str, keys: Strings) -> np.ndarray:
        """int64 [n]: row of the caption of each key, -1 = none. A key in the files is "SHARD/KEY" or "KEY" alone."""
        result = np.full(len(keys), -1, np.int64)
        if not len(self):
            return result
        for prefix in ("", shard + "/"):  # the full name last: it wins over the short one
            names = ((prefix + keys[i]).encode("utf-8", "surrogateescape") for i in range(len(keys)))
            wanted = np.fromiter(map(hash64, names), np.uint64, len(keys))
            rows = np.minimum(np.searchsorted(self.hash, wanted), len(self) - 1)
            result = np.where(self.hash[rows] == wanted, rows, result)
        return result


def open_captions(paths: str | Sequence[str]) -> Captions:
    """Opens caption files (paths, URLs, globs); a later line for the same key replaces an earlier one.

    Parquet: columns "key" and "caption". JSONL: {"key": ..., "caption": ...}, or {KEY: CAPTION, ...} in a line.
    Entries without a caption are left out; so are broken lines, which are counted and logged. Raises DataError that
    names the file and what is wrong in it if none of its lines is good.
    """
    files = storage.expand(paths)
    name = storage.digest(_VERSION, *(f"{storage.basename(file)} {file} {storage.stamp(file)}" for file in files))
    folder = storage.cache_dir() / "captions" / name
    if not (folder / "captions.json").exists():
        _build(files, folder)
    captions = Captions(folder)
    for file, (count, first) in captions.broken.items():
        _log.warning("%s: %d broken lines left out, the first is line %d", file, count, first)
    return captions


def _build(files: Sequence[str], folder: Path) -> None:
    """Texts go to the disk as they come; in memory are 29 bytes a caption, for sorting."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    storage.remove_stale(folder.parent)
    temporary = storage.temporary_beside(folder)
    temporary.mkdir()
    try:
        columns, broken = _collect(files, temporary / "texts")
        # Sorted by key, of equal keys the last: a stable sort of the reversed list puts it first.
        order = (len(columns["hash"]) - 1 - np.argsort(columns["hash"][::-1], kind="stable")).astype(np.int64)
        first = np.ones(len(order), bool)
        first[1:] = np.diff(columns["hash"][order]) != 0
        order = order[first]
        for name in _ARRAYS:
            columns[name] = columns[name][order]
            np.save(temporary / f"{name}.npy", columns[name])
        digest = storage.digest(columns["hash"].tobytes(), columns["text_hash"].tobytes())
        (temporary / "captions.json").write_text(json.dumps({"digest": digest, "broken": broken}))
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _collect(files: Sequence[str], texts: Path) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """(the table's columns in the order of the files, broken lines); captions themselves are written to ``texts``."""
    broken: dict[str, list[int]] = {}
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in _ARRAYS.items()}
    position = 0
    with texts.open("wb") as stream:
        for entries in _batched(entry for file in files for entry in _entries(file, broken)):
            data = [caption.encode() for _, caption in entries]
            stream.writelines(data)
            lengths = np.array([len(d) for d in data], np.int64)
            new = {
                "hash": [hash64(key.encode("utf-8", "surrogatepass")) for key, _ in entries],
                "start": position + np.cumsum(lengths) - lengths,
                "length": lengths,
                "chars": [len(caption) for _, caption in entries],
                "text_hash": [hash64(d) for d in data],
                "script": [script_of(caption) for _, caption in entries],
            }
            for name, values in new.items():
                parts[name].append(np.asarray(values, _ARRAYS[name]))
            position += int(lengths.sum())
    return {name: np.concatenate(parts[name]) for name in _ARRAYS}, broken


def _batched(entries: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    while batch := list(itertools.islice(entries, _BUFFERED)):
        yield batch


def _entries(file: str, broken: dict[str, list[int]]) -> Iterator[tuple[str, str]]:
    pairs = _parquet_entries(file) if file.endswith(".parquet") else _jsonl_entries(file, broken)
    for key, caption in pairs:
        if isinstance(caption, str) and caption.strip():
            yield str(key), caption.encode("utf-8", "replace").decode()


def _parquet_entries(file: str) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipelines.sources.formats.parquet import open_parquet

    with open_parquet(file) as handle:
        try:
            parquet = pq.ParquetFile(handle)
            missing = {"key", "caption"} - set(parquet.schema_arrow.names)
            if missing:
                raise DataError(f"{file}: no column {sorted(missing)[0]!r}; caption files need 'key' and 'caption'")
            for batch in parquet.iter_batches(columns=["key", "caption"]):
                yield from zip(batch.column("key").to_pylist(), batch.column("caption").to_pylist())
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not a readable parquet file ({error})") from None


def _jsonl_entries(file: str, broken: dict[str, list[int]]) -> Iterator[tuple[Any, Any]]:
    """(key, caption) of the lines; how many are ``broken`` and the first of them is added there.

    Raises DataError if all are.
    """
    from data_pipelines.sources.formats.jsonl import lines

    bad, good, why = [], 0, ""
    with storage.scan_view(file) as view:
        for number, offset, length in lines(view):
            try:
                value = _line(view, offset, length)
            except (ValueError, RecursionError) as error:
                why = why or f"{file}:{number}: not JSON with 'key' and 'caption' ({error})"
                bad = [bad[0] + 1, bad[1]] if bad else [1, number]
                continue
            good += 1
            yield from [(value["key"], value["caption"])] if {"key", "caption"} <= value.keys() else value.items()
    if bad and not good:
        raise DataError(why)
    if bad:
        broken[file] = bad


def _line(view: storage.ScanView, offset: int, length: int) -> dict[str, Any]:
    """The object in a line. Raises ValueError."""
    if length > _MAX_LINE:
        raise ValueError(f"{length} bytes long")
    value = json.loads(view.read(offset, length))
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value
