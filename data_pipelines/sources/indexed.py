"""Sources built from indexed shards: one table of all offered samples, and bytes fetched on demand."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample, DataError, StorageError
from data_pipelines.io import paths
from data_pipelines.io.storage import patiently, storage_error
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.records.video.reference import with_frames
from data_pipelines.sources.formats.format import Format
from data_pipelines.sources.indices.columns import Columns, Strings, ranges
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.unchanged import check_content, check_stamp


class IndexedSource:
    """Random access to the samples of a table (see ``source.Source``); their format determines how they are read."""

    def __init__(
        self,
        name: str,
        format: Format,
        shards: Sequence[Shard],
        table: Columns,
        fingerprint: str = "",
        dropped: Mapping[str, int] | None = None,
        problems: Mapping[str, Sequence[str]] | None = None,
        counts: Mapping[str, int] | None = None,
        filtered: Mapping[str, int] | None = None,
        examples: Mapping[str, str] | None = None,
    ):
        """examples: of dropped samples, by reason."""
        self.name = name
        self.shards = list(shards)
        self.table = table
        self.is_remote = any(paths.is_remote(shard.path) for shard in self.shards)
        self._format = format
        self._fingerprint = fingerprint
        self.examples = dict(examples or {})
        self._dropped = dict(dropped or {})
        self._counts, self._filtered = dict(counts or {}), dict(filtered or {})
        self._problems = {path: list(found) for path, found in (problems or {}).items()}
        self._ends: list[int] = table["shard_end"].tolist()

    @functools.cached_property
    def _keys(self) -> Strings:
        return self.table.strings("keys")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_keys"}  # part of the table already

    def __len__(self) -> int:
        return self._ends[-1]

    def fingerprint(self) -> str:
        return self._fingerprint

    def dropped(self) -> dict[str, int]:
        return {**self._dropped, **self._filtered}

    def filtered(self) -> dict[str, int]:
        return dict(self._filtered)

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def problems(self) -> dict[str, list[str]]:
        return {path: list(found) for path, found in self._problems.items()}

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        counts = np.asarray(self.table["image_count"][indices])
        return counts, np.asarray(self.table["image_size"][ranges(self.table["image_end"][indices] - counts, counts)])

    def most_tiles(self, indices: np.ndarray) -> np.ndarray:
        if not any(shard.max_tiles for shard in self.shards):
            return np.zeros(len(indices), np.int32)
        limits = np.array([shard.max_tiles for shard in self.shards], np.int32)
        return limits[np.searchsorted(self._ends, np.asarray(indices, np.int64), side="right")]

    def frames(self, index: int) -> tuple[int, ...]:
        """``RawSample.frames`` of a sample."""
        found = Entry(self.table, index).frames() if "image_frame" in self.table else ()
        return tuple(found) if any(found) else ()

    def frame_tiles(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        counts = np.asarray(self.table["image_count"][indices])
        if "image_frame" not in self.table:
            return np.zeros(counts.sum(), np.int32)
        is_frame = self.table["image_frame"][ranges(self.table["image_end"][indices] - counts, counts)] > 0
        limits = np.array([shard.frame_tiles for shard in self.shards], np.int32)
        return np.repeat(limits[np.searchsorted(self._ends, indices, side="right")], counts) * is_frame

    def key(self, index: int) -> str:
        return self._key(self._shard(index), int(index))

    def _key(self, shard: Shard, index: int) -> str:
        key = shard.name + self._format.key_separator + self._keys[index]
        times = int(self.table["repeat"][index]) + 1 if "repeat" in self.table else 1
        return key if times == 1 else f"{key}#{times}"

    def read(self, index: int) -> RawSample:
        return self._read(int(index), images=True, text=True)

    def read_text(self, index: int) -> RawSample:
        return self._read(int(index), images=False, text=True)

    def read_images(self, index: int) -> RawSample:
        return self._read(int(index), images=True, text=False)

    def _read(self, index: int, images: bool, text: bool) -> RawSample:
        shard = self._shard(index)
        key = self._key(shard, index)
        try:
            sample = patiently(
                lambda: self._once(shard, Entry(self.table, index), images, text),
                missing=True,
                forget=lambda: self._forget(shard),
            )
        except BadSample as error:
            raise BadSample(error.reason, key, error.detail) from None
        encoding = {"max_tiles": shard.max_tiles, "jpeg_augment": shard.jpeg_augment, "frame_tiles": shard.frame_tiles}
        sample = with_frames(sample, self.frames(index))
        return dataclasses.replace(sample, key=key, image_refs=(), **encoding)

    def _once(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """One attempt. A sample that the index offers is only bad if its shard is the one that was indexed."""
        check_stamp(shard)
        try:
            return self._format.read(shard, entry, images, text)
        except StorageError:
            raise
        except BadSample:
            check_content(shard)
            raise
        except (OSError, DataError) as error:
            raise storage_error(shard.path, error) from None

    def _forget(self, shard: Shard) -> None:
        self._format.forget()
        if self.is_remote:
            with contextlib.suppress(Exception):  # it is requested again anyway
                paths.filesystem(shard.path)[0].invalidate_cache()

    def check_unchanged(self, index: int) -> None:
        shard = self._shard(int(index))
        patiently(lambda: check_stamp(shard), missing=True)
        patiently(lambda: check_content(shard), missing=True)

    def _shard(self, index: int) -> Shard:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"sample {index} of {len(self)} in source {self.name}")
        return self.shards[bisect.bisect_right(self._ends, index)]
