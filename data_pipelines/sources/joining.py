"""Files that are joined to shards by key, such as captions and scores: their tables, and looking up rows in them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io import paths, publish
from data_pipelines.io.digests import digest, hash64
from data_pipelines.io.storage import patiently, storage
from data_pipelines.sources.indices.columns import Columns, Strings


def open_table(
    patterns: str | Sequence[str], kind: str, version: str, write: Callable[[Sequence[str], Path], None]
) -> tuple[Columns, dict[str, Any]]:
    """The table of the files (paths, URLs, globs) and its header, from the cache if it exists.

    Args:
      kind: name of the tables' folder in the cache.
      version: of the table's format.
      write: writes the table of files to an empty folder.

    Raises what ``write`` raises; DataError if nothing can be kept in the cache.
    """
    files = paths.expand(patterns)
    stamps = [patiently(functools.partial(paths.stamp, file)) for file in files]
    name = digest(version, *(f"{paths.basename(file)} {file} {stamp}" for file, stamp in zip(files, stamps)))
    folder = paths.cache_dir() / kind / name
    with storage(str(folder), "free some space, or set MONO_JAX_CACHE"):
        kept = Columns.load_whole(folder)
        if kept is None:
            publish.remove_stale(folder.parent)
            with contextlib.suppress(FileExistsError), publish.new_folder(folder, replace=True) as new:
                write(files, new)
            kept = Columns.load_whole(folder)
    if kept is None:
        raise DataError(f"{folder}: cannot be kept there; remove it, or set MONO_JAX_CACHE")
    return kept


def last_of_equals(hashes: np.ndarray) -> np.ndarray:
    """int64 [k]: the order that sorts ``hashes`` (uint64 [n]), with only the last of equal ones."""
    # A stable sort of the reversed list puts the last of equals first.
    order = (len(hashes) - 1 - np.argsort(hashes[::-1], kind="stable")).astype(np.int64)
    first = np.ones(len(order), bool)
    first[1:] = np.diff(hashes[order]) != 0
    return order[first]


def find(hashes: np.ndarray, wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``rows`` (int64 [n], -1 = none) with the positions of those of ``wanted`` that are in the sorted ``hashes``."""
    if not len(hashes):
        return rows
    places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    return np.where(hashes[places] == wanted, places, rows)


def find_keys(hashes: np.ndarray, shard: str, keys: Strings, rows: np.ndarray, separator: str = "/") -> np.ndarray:
    """Like ``find``, for a shard's samples by the hash of "SHARD/KEY" (with this ``separator``), or else of "KEY"."""
    for prefix in ("", shard + separator):  # the full name last: it takes precedence over the short one
        names = ((prefix + keys[i]).encode("utf-8", "surrogateescape") for i in range(len(keys)))
        rows = find(hashes, np.fromiter(map(hash64, names), np.uint64, len(keys)), rows)
    return rows
