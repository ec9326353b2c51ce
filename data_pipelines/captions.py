"""Captions joined to existing shards by key, such as the synthetic ones of stage S1.2 (parquet or JSONL files).

The files are turned once into a table in the cache folder that is mapped, not loaded: a few hundred million captions
need disk space there, not memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import storage
from data_pipelines.errors import DataError
from data_pipelines.scripts import script_of
from data_pipelines.shard_index import Strings, hash64

_ARRAYS = ("hash", "end", "data", "chars", "text_hash", "script")


class Captions:
    """Captions by the hash of their key, sorted by it; ``captions[row]`` is a caption's text."""

    def __init__(self, folder: Path):
        self.folder = folder
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.hash, self.chars, self.text_hash, self.script = (
            arrays[name] for name in ("hash", "chars", "text_hash", "script")
        )
        self._texts = Strings(arrays["data"], arrays["end"])
        self.digest: str = json.loads((folder / "captions.json").read_text())["digest"]

    def __len__(self) -> int:
        return len(self.hash)

    def __getitem__(self, row: int) -> str:
        return self._texts[int(row)]

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
    Entries without a caption are left out. Raises DataError that names the file and what is wrong in it.
    """
    files = storage.expand(paths)
    name = storage.digest(*(f"{storage.basename(file)} {file} {storage.stamp(file)}" for file in files))
    folder = storage.cache_dir() / "captions" / name
    if not (folder / "captions.json").exists():
        _build(files, folder)
    return Captions(folder)


def _build(files: Sequence[str], folder: Path) -> None:
    hashes, texts = [], []
    for file in files:
        for key, caption in _entries(file):
            hashes.append(hash64(key.encode("utf-8", "surrogatepass")))
            texts.append(caption)
    hash_array = np.array(hashes, np.uint64)
    # Sorted by key, of equal keys the last: a stable sort of the reversed list puts it first.
    order = (len(hash_array) - 1 - np.argsort(hash_array[::-1], kind="stable")).astype(np.int64)
    first = np.ones(len(order), bool)
    first[1:] = np.diff(hash_array[order]) != 0
    order = order[first]
    data = [texts[i].encode() for i in order]
    strings = Strings.of(data)
    arrays = {
        "hash": hash_array[order],
        "end": strings.ends,
        "data": strings.data,
        "chars": np.array([len(texts[i]) for i in order], np.int32),
        "text_hash": np.array([hash64(d) for d in data], np.uint64),
        "script": np.array([script_of(texts[i]) for i in order], np.uint8),
    }
    digest = storage.digest(arrays["hash"].tobytes(), arrays["text_hash"].tobytes())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "captions.json").write_text(json.dumps({"digest": digest}))
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entries(file: str) -> Iterator[tuple[str, str]]:
    pairs = _parquet_entries(file) if file.endswith(".parquet") else _jsonl_entries(file)
    for key, caption in pairs:
        if isinstance(caption, str) and caption.strip():
            yield str(key), caption.encode("utf-8", "replace").decode()


def _parquet_entries(file: str) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipelines.formats.parquet import open_parquet

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


def _jsonl_entries(file: str) -> Iterator[tuple[Any, Any]]:
    from data_pipelines.formats.jsonl import lines

    with storage.scan_view(file) as view:
        for number, offset, length in lines(view):
            try:
                value = json.loads(view.read(offset, length))
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise DataError(f"{file}:{number}: expected an object with 'key' and 'caption'")
            if "key" in value and "caption" in value:
                yield value["key"], value["caption"]
            else:
                yield from value.items()
