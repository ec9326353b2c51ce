"""Captions joined to existing shards by key, such as the synthetic ones of S1.2, and the source that has them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources import joining
from data_pipelines.sources.caption_files import SALTS, VERSION, write_table
from data_pipelines.sources.indices.columns import Columns, Strings

if TYPE_CHECKING:
    from data_pipelines.sources.indexed import IndexedSource

_log = logging.getLogger(__name__)


class Captions:
    """Captions sorted by the hash of their key; ``captions[row]`` is a caption's text.

    Attributes:
      columns: see ``caption_files``.
      digest: of keys and texts.
      broken: for each file with unreadable lines, how many there are and the line number of the first.
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
        captions without a key.
        """
        result, hashes = np.full(len(keys), -1, np.int64), self.columns["hash"]
        for name, values in (origins or {}).items():
            salted = joining.find(hashes, values ^ np.uint64(SALTS[name]), result)
            result = np.where(values != 0, salted, result)
        return joining.find_keys(hashes, shard, keys, result)

    def contradicts(self, rows: np.ndarray, origins: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [n]: whether the caption of each of ``rows`` names another url or sha256."""
        result = np.zeros(len(rows), bool)
        for name, values in origins.items():
            stated = self.columns[name][rows]
            result |= (stated != 0) & (values != 0) & (stated != values)
        return result


def open_captions(patterns: str | Sequence[str]) -> Captions:
    """Opens caption files (paths, URLs, globs); a later line for the same key replaces an earlier one.

    Parquet: columns "key" (or "url" or "sha256") and "caption" (or another of ``names.CAPTION_FIELDS``). JSONL: the
    same as objects, or {KEY: CAPTION, ...} in a line.
    Entries without a caption are left out; so are broken lines, which are counted and logged. If a file has no good
    line, raises a DataError that names the file and the problem.
    """
    captions = Captions(*joining.open_table(patterns, "captions", VERSION, write_table))
    for file, (count, first) in captions.broken.items():
        _log.warning("%s: %d broken lines left out, the first is line %d", file, count, first)
    return captions


class CaptionedSource:
    """A source whose samples have joined captions instead of their own texts (see ``source.Source``)."""

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
