"""The index of one shard: the places of each sample's parts, and what filters and planning need to know about them.

Columns (n samples, m images in all; the images of a sample are adjacent):

    keys           n byte strings    unique within the shard
    reason         uint8   [n]       0 = usable, otherwise 1 + index into ``reasons``
    image_count    int32   [n]
    image_offset   int64   [m]       bytes from the start of the shard (row number in parquet and record files)
    image_length   int64   [m]       bytes
    image_size     int32   [m, 2]    width and height of the upright image (EXIF orientation applied)
    image_frame    uint16  [m]       number of a frame within its video, from 1; 0 = an image
    image_name     m byte strings    file names (kind "files" only, otherwise empty)
    text_name      n byte strings    the same for the text part
    image_hash     uint64  [n]       of the encoded images; 0 = not known
    text_offset    int64   [n]       of the text part
    text_length    int32   [n]
    text_form      uint8   [n]       raw_sample.Form
    text_chars     int32   [n]       characters of caption, conversation or text
    text_hash      uint64  [n]       of its ``RawSample.identity``: equal only for texts encoded the same way
    detail         n byte strings    exactly what is wrong with unusable samples, otherwise empty
    record_id      n byte strings    the ids in the records of unusable samples, otherwise empty
    script         uint8   [n]       scripts.SCRIPTS: the writing system most letters belong to
    url_hash, sha256_hash   uint64 [n]  from the sample's metadata, 0 = not known: for joined captions
    similarity, punsafe, pwatermark, aesthetic   float32 [n], NaN = not given
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs, copies, paths
from data_pipelines.io.digests import digest, json_digest, with_checksum, without_checksum
from data_pipelines.io.storage import patiently
from data_pipelines.sources.indices.columns import Strings

VERSION = 7  # of the content of an index and of how shards are scanned
SUFFIX = ".index.npz"
UNASKED = "could_not_be_asked"  # reason for samples whose files did not answer: retried at the next opening
SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")
ORIGINS = ("url_hash", "sha256_hash")  # not part of the content's digest
IMAGE_COLUMNS = {"image_offset": np.int64, "image_length": np.int64, "image_size": np.int32, "image_frame": np.uint16}
SAMPLE_COLUMNS = {
    "reason": np.uint8,
    "image_count": np.int32,
    "image_hash": np.uint64,
    "text_offset": np.int64,
    "text_length": np.int32,
    "text_form": np.uint8,
    "text_chars": np.int32,
    "text_hash": np.uint64,
    "script": np.uint8,
    **dict.fromkeys(SCORES, np.float32),
    **dict.fromkeys(ORIGINS, np.uint64),
}
_STRINGS = ("keys", "image_name", "text_name", "detail", "record_id")


@dataclasses.dataclass
class ShardIndex:
    """See the module's docstring for the columns.

    Attributes:
      keys, image_name, text_name, detail, record_id: string columns of the samples and images.
      columns: the numeric columns by name.
      reasons: why samples are unusable; ``columns["reason"]`` counts from 1 into it.
      problems: descriptions of what is wrong with the shard as a whole.
      meta: version, kind, stamp and contents of the shard (see ``formats.format``), digest of the index's content.
    """

    keys: Strings
    image_name: Strings
    text_name: Strings
    detail: Strings
    record_id: Strings
    columns: dict[str, np.ndarray]
    reasons: list[str]
    problems: list[str]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def usable(self) -> np.ndarray:
        """int64 rows of the usable samples."""
        return np.flatnonzero(self.columns["reason"] == 0)

    @property
    def unasked(self) -> np.ndarray:
        """int64 rows of the samples some of whose files did not answer."""
        if UNASKED not in self.reasons:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.columns["reason"] == 1 + self.reasons.index(UNASKED))

    def dropped(self) -> dict[str, int]:
        """Number of unusable samples, by reason."""
        counts = np.bincount(self.columns["reason"], minlength=len(self.reasons) + 1)[1:]
        return {reason: int(count) for reason, count in zip(self.reasons, counts) if count}

    def examples(self) -> dict[str, tuple[str, str]]:
        """(key, detail) of the first unusable sample for each reason."""
        found = {}
        for number, reason in enumerate(self.reasons, 1):
            rows = np.flatnonzero(self.columns["reason"] == number)
            if len(rows):
                row = int(rows[0])
                found[reason] = self.keys[row], self.detail[row] if len(self.detail) else ""
        return found

    def to_bytes(self) -> bytes:
        """The content of an index file."""
        buffer = io.BytesIO()
        header = {"reasons": self.reasons, "problems": self.problems, "meta": self.meta}
        np.savez_compressed(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{name: getattr(self, name).data for name in _STRINGS},
            **{name + "_end": getattr(self, name).ends for name in _STRINGS},
            **self.columns,
        )
        return with_checksum(buffer.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """Raises ValueError if ``data`` is not an intact index of this version."""
        try:
            with np.load(io.BytesIO(without_checksum(data)), allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                if header["meta"]["version"] != VERSION:
                    raise ValueError("index of another version")
                return cls(
                    *(Strings(file[name], file[name + "_end"]) for name in _STRINGS),
                    {name: file[name] for name in (*SAMPLE_COLUMNS, *IMAGE_COLUMNS)},
                    header["reasons"],
                    header["problems"],
                    header["meta"],
                )
        except Exception as error:  # zip, zlib, NumPy and JSON raise many types on damaged data
            raise ValueError(f"not an index: {error}") from None


def index_paths(shard: str, options: Mapping[str, Any], index_dir: str | None = None) -> list[str]:
    """Where the index of ``shard`` may be: in ``index_dir`` if given, otherwise beside the shard or in the cache.

    Options that affect the content are part of the name, so that two uses of one shard do not overwrite each other.
    """
    suffix = "." + json_digest(options)[:8] if options else ""
    name = paths.basename(shard) + suffix + SUFFIX
    elsewhere = digest(shard if paths.is_remote(shard) else paths.local_path(shard))[:16] + "-" + name
    if index_dir:
        return [paths.join(index_dir, elsewhere)]
    return [shard.rstrip("/") + suffix + SUFFIX, str(paths.cache_dir() / "index" / elsewhere)]


def load_whole(candidates: Iterable[str], kind: str) -> Iterator[ShardIndex]:
    """The intact indices in ``candidates`` built for this kind. Raises StorageError if one does not answer."""
    for path in candidates:
        try:
            index = ShardIndex.from_bytes(patiently(functools.partial(blobs.read_bytes, path)))
            if index.meta["kind"] == kind and {"stamp", "contents", "digest"} <= index.meta.keys():
                yield index
        except (ValueError, KeyError):
            continue  # damaged or of another version
        except StorageError as error:
            if not error.missing:
                raise


def save(index: ShardIndex, candidates: Sequence[str]) -> str | None:
    """Writes to the first writable path in ``candidates`` and returns it; None if there is none."""
    data = index.to_bytes()
    for path in candidates:
        try:
            copies.write_bytes(path, data)
            return path
        except (OSError, StorageError):
            continue
    return None
