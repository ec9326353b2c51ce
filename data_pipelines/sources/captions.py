"""Captions joined to existing shards by key, such as the synthetic ones of S1.2, and the source that has them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io import paths, publish
from data_pipelines.io.digests import digest, hash64
from data_pipelines.io.storage import patiently, storage
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.caption_files import SALTS, VERSION, write_table
from data_pipelines.sources.indices.columns import Columns, Strings

if TYPE_CHECKING:
    from data_pipelines.sources.indexed import IndexedSource

_log = logging.getLogger(__name__)


class Captions:
    """Captions by the hash of their key, sorted by it; ``captions[row]`` is a caption's text.

    Attributes:
      columns: see ``caption_files``.
      digest: of keys and texts.
      broken: for each file with unreadable lines, their number and the number of the first.
    """

    def __init__(self, columns: Columns, header: dict[str, Any]):
        self.columns = columns
        self.digest: str = header["digest"]
        self.broken: dict[str, list[int]] = header["broken"]

    def __len__(self) -> int:
        return len(self.columns["hash"])

    def __getitem__(self, row: int) -> str:
        start = int(self.columns["start"][row])
        return self.columns["texts"][start : start + int(self.columns["length"][row])].tobytes().decode()

    def find(self, shard: str, keys: Strings, origins: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """int64 [n]: row of the caption of each sample, -1 = none.

        A key in the files is "SHARD/KEY" or only "KEY"; ``origins``: hashes of the samples' urls and sha256s, for
        captions that have no key.
        """
        result = np.full(len(keys), -1, np.int64)
        if not len(self):
            return result
        for name, values in (origins or {}).items():
            result = np.where(values != 0, self._found(values ^ np.uint64(SALTS[name]), result), result)
        for prefix in ("", shard + "/"):  # the full name last: it takes precedence over the short one
            names = ((prefix + keys[i]).encode("utf-8", "surrogateescape") for i in range(len(keys)))
            result = self._found(np.fromiter(map(hash64, names), np.uint64, len(keys)), result)
        return result

    def contradicts(self, rows: np.ndarray, origins: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [n]: whether the caption of each of ``rows`` is said to belong to another url or sha256."""
        result = np.zeros(len(rows), bool)
        for name, values in origins.items():
            stated = self.columns[name][rows]
            result |= (stated != 0) & (values != 0) & (stated != values)
        return result

    def _found(self, wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """``rows`` (int64 [n], -1 = none) with those of the names whose hashes are ``wanted``."""
        hashes = self.columns["hash"]
        places = np.minimum(np.searchsorted(hashes, wanted), len(self) - 1)
        return np.where(hashes[places] == wanted, places, rows)


def open_captions(patterns: str | Sequence[str]) -> Captions:
    """Opens caption files (paths, URLs, globs); a later line for the same key replaces an earlier one.

    Parquet: columns "key" (or "url" or "sha256") and "caption" (or another of ``names.CAPTION_FIELDS``). JSONL: the
    same as objects, or {KEY: CAPTION, ...} in a line.
    Entries without a caption are left out; so are broken lines, which are counted and logged. Raises DataError that
    names the file and what is wrong in it if none of its lines is good.
    """
    files = paths.expand(patterns)
    stamps = [patiently(functools.partial(paths.stamp, file)) for file in files]
    name = digest(VERSION, *(f"{paths.basename(file)} {file} {stamp}" for file, stamp in zip(files, stamps)))
    folder = paths.cache_dir() / "captions" / name
    with storage(str(folder), "free some space, or set MONO_JAX_CACHE"):
        kept = Columns.load_whole(folder)
        if kept is None:
            publish.remove_stale(folder.parent)
            with contextlib.suppress(FileExistsError), publish.new_folder(folder, replace=True) as new:
                write_table(files, new)
            kept = Columns.load_whole(folder)
    if kept is None:
        raise DataError(f"{folder}: cannot be kept there; remove it, or set MONO_JAX_CACHE")
    captions = Captions(*kept)
    for file, (count, first) in captions.broken.items():
        _log.warning("%s: %d broken lines left out, the first is line %d", file, count, first)
    return captions


class CaptionedSource:
    """A source whose samples have joined captions in place of their own texts (see ``source.Source``)."""

    def __init__(self, source: IndexedSource, captions: Captions, table: Columns):
        """table: its column "caption_row" (int64 [n]) holds each sample's row of ``captions``."""
        self.name, self.is_remote = source.name, source.is_remote
        self.source = source
        self.table = table
        self._captions = captions

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def read(self, index: int) -> RawSample:
        return self._with_caption(self.source.read_images(index), index)

    def read_text(self, index: int) -> RawSample:
        frames = self.source.frames(int(index))
        return self._with_caption(RawSample(self.source.key(index), frames=frames), index)

    def read_images(self, index: int) -> RawSample:
        return self.source.read_images(index)

    def _with_caption(self, sample: RawSample, index: int) -> RawSample:
        return dataclasses.replace(sample, caption=self._captions[int(self.table["caption_row"][index])])

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.source.image_sizes(indices)

    def most_tiles(self, indices: np.ndarray) -> np.ndarray:
        return self.source.most_tiles(indices)

    def frame_tiles(self, indices: np.ndarray) -> np.ndarray:
        return self.source.frame_tiles(indices)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def dropped(self) -> dict[str, int]:
        return self.source.dropped()

    def filtered(self) -> dict[str, int]:
        return self.source.filtered()

    def counts(self) -> dict[str, int]:
        return self.source.counts()

    def check_unchanged(self, index: int) -> None:
        self.source.check_unchanged(index)

    def problems(self) -> dict[str, list[str]]:
        return self.source.problems()
