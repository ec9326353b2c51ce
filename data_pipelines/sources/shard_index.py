"""The index of one shard: where each sample's parts lie and what is known about them without reading them again.

Columns (n samples, m images in all; the images of a sample follow one another):

    keys           n byte strings    unique within the shard
    reason         uint8   [n]       0 = usable, otherwise 1 + index into ``reasons``
    image_count    int32   [n]
    image_offset   int64   [m]       bytes from the start of the shard (row number in parquet and record files)
    image_length   int64   [m]       bytes
    image_size     int32   [m, 2]    width and height of the upright image (EXIF orientation applied)
    image_name     m byte strings    file names (kind "files" only, otherwise empty)
    text_name      n byte strings    the same for the text part
    image_hash     uint64  [n]       of the encoded images; 0 = not known
    text_offset    int64   [n]       of the text part
    text_length    int32   [n]
    text_form      uint8   [n]       records.Form
    text_chars     int32   [n]       characters of caption, conversation or text
    text_hash      uint64  [n]       of the same
    script         uint8   [n]       scripts.SCRIPTS: the writing system most letters belong to
    similarity, punsafe, pwatermark, aesthetic   float32 [n], NaN = not given
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.io import storage
from data_pipelines.records.scripts import script_of
from data_pipelines.records.text_record import Form, Record

VERSION = 2  # of what an index holds and of how shards are looked at
SUFFIX = ".index.npz"
SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")

_STRINGS = ("keys", "image_name", "text_name")
_IMAGE_COLUMNS = {"image_offset": np.int64, "image_length": np.int64, "image_size": np.int32}
_SAMPLE_COLUMNS = {
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
}


def hash64(data: bytes) -> int:
    """64-bit content hash, never 0 (which stands for "not known")."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class Strings:
    """n byte strings in one buffer; ``strings[i]`` decodes one."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Strings:
        return cls(
            np.frombuffer(b"".join(items), np.uint8), np.cumsum([len(i) for i in items], dtype=np.int64).reshape(-1)
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def take(self, rows: np.ndarray) -> Strings:
        """The strings of ``rows``, in that order."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64) if len(self.ends) else self.ends
        lengths = (self.ends - starts)[rows]
        ends = np.cumsum(lengths, dtype=np.int64)
        gather = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts[rows] - (ends - lengths), lengths)
        return Strings(self.data[gather], ends)


@dataclasses.dataclass
class ShardIndex:
    """See the module's docstring for the columns.

    Attributes:
      keys, image_name, text_name: strings of the samples and images.
      columns: the numeric columns by name.
      reasons: why samples are unusable; ``columns["reason"]`` counts from 1 into it.
      problems: what is wrong with the shard as a whole, in words.
      meta: version, kind, options that decided the content, stamp of the file, digest of the content.
    """

    keys: Strings
    image_name: Strings
    text_name: Strings
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

    def dropped(self) -> dict[str, int]:
        """Number of unusable samples by reason."""
        counts = np.bincount(self.columns["reason"], minlength=len(self.reasons) + 1)[1:]
        return {reason: int(count) for reason, count in zip(self.reasons, counts) if count}

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        header = {"reasons": self.reasons, "problems": self.problems, "meta": self.meta}
        np.savez_compressed(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{name: getattr(self, name).data for name in _STRINGS},
            **{name + "_end": getattr(self, name).ends for name in _STRINGS},
            **self.columns,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """Raises ValueError if ``data`` is not a whole index of this version."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                if header["meta"]["version"] != VERSION:
                    raise ValueError("index of another version")
                return cls(
                    *(Strings(file[name], file[name + "_end"]) for name in _STRINGS),
                    {name: file[name] for name in (*_SAMPLE_COLUMNS, *_IMAGE_COLUMNS)},
                    header["reasons"],
                    header["problems"],
                    header["meta"],
                )
        except Exception as error:  # what is damaged makes zip, zlib, NumPy and JSON raise many kinds
            raise ValueError(f"not an index: {error}") from None


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """One encoded image of a sample: its place, its upright size and (kind "files") its file name."""

    offset: int
    length: int
    size: tuple[int, int]
    name: str = ""


class IndexBuilder:
    """Collects samples in order; ``build`` makes the index. The first of a repeated key counts, others are unusable."""

    def __init__(self) -> None:
        self._rows: dict[str, list] = {name: [] for name in _SAMPLE_COLUMNS}
        self._image_rows: dict[str, list] = {name: [] for name in _IMAGE_COLUMNS}
        self._keys: list[bytes] = []
        self._image_names: list[bytes] = []
        self._text_names: list[bytes] = []
        self._seen: set[bytes] = set()
        self._reasons: dict[str, int] = {}
        self.problems: list[str] = []

    def add(
        self,
        key: str,
        *,
        images: Sequence[ImagePart] = (),
        text: tuple[int, int, int] = (0, 0, Form.NONE),
        text_name: str = "",
        record: Record | None = None,
        scores: Mapping[str, float] | None = None,
        image_hash: int = 0,
        reason: str | None = None,
    ) -> None:
        """One sample.

        Args:
          text: (offset, length, form) of the text part; ``text_name`` its file name (kind "files").
          record: the parsed text part, if it could be parsed.
          reason: why the sample is unusable.
        """
        name = key.encode("utf-8", "surrogateescape")
        if name in self._seen:
            reason = "duplicate_key"
        self._seen.add(name)
        self._keys.append(name)
        self._text_names.append(text_name.encode("utf-8", "surrogateescape"))
        content = record.content if record else ""
        row = self._rows
        row["reason"].append(0 if reason is None else self._reason(reason))
        row["image_count"].append(len(images))
        row["image_hash"].append(image_hash)
        row["text_offset"].append(text[0])
        row["text_length"].append(text[1])
        row["text_form"].append(text[2])
        row["text_chars"].append(len(content))
        row["text_hash"].append(hash64(content.encode("utf-8", "surrogatepass")) if content else 0)
        row["script"].append(script_of(content))
        for score in SCORES:
            row[score].append(scores.get(score, math.nan) if scores else math.nan)
        for image in images:
            self._image_rows["image_offset"].append(image.offset)
            self._image_rows["image_length"].append(image.length)
            self._image_rows["image_size"].append(image.size)
            self._image_names.append(image.name.encode("utf-8", "surrogateescape"))

    def _reason(self, reason: str) -> int:
        return self._reasons.setdefault(reason, len(self._reasons) + 1)

    def build(self, meta: Mapping[str, Any]) -> ShardIndex:
        columns = {name: np.asarray(values, _SAMPLE_COLUMNS[name]) for name, values in self._rows.items()}
        columns |= {name: np.asarray(values, _IMAGE_COLUMNS[name]) for name, values in self._image_rows.items()}
        columns["image_size"] = columns["image_size"].reshape(-1, 2)
        keys = Strings.of(self._keys)
        names = [Strings.of(n if any(n) else []) for n in (self._image_names, self._text_names)]
        # Identity of the content: where everything lies and what it says, but no path, host or time.
        content = storage.digest(
            keys.data.tobytes(),
            *(columns[name].tobytes() for name in sorted(columns)),
            json.dumps([list(self._reasons), meta["kind"]]),
        )
        header = {"version": VERSION, "digest": content, **meta}
        return ShardIndex(keys, *names, columns, list(self._reasons), self.problems, header)


def scores_of(value: Mapping[str, Any]) -> dict[str, float]:
    """The known scores of a metadata object, whatever the case of their names; what is not a number is left out."""
    found = {}
    for name, number in value.items():
        name = str(name).lower().removesuffix("_score")
        if name in SCORES and isinstance(number, int | float) and not isinstance(number, bool):
            found[name] = float(number)
    return found


def index_path(shard: str, options: Mapping[str, Any], index_dir: str | None = None) -> list[str]:
    """Where the index of ``shard`` may lie: ``index_dir`` if given, otherwise beside the shard, then the cache folder.

    Options that change the content are part of the name, so that two uses of one shard do not overwrite each other.
    """
    suffix = "." + storage.digest(json.dumps(options, sort_keys=True))[:8] if options else ""
    name = storage.basename(shard) + suffix + SUFFIX
    elsewhere = storage.digest(shard if storage.is_remote(shard) else storage.local_path(shard))[:16] + "-" + name
    if index_dir:
        return [storage.join(index_dir, elsewhere)]
    return [shard.rstrip("/") + suffix + SUFFIX, str(storage.cache_dir() / "index" / elsewhere)]


def load_fresh(places: Iterable[str], kind: str, stamp: str) -> ShardIndex | None:
    """The first whole index in ``places`` that was made for this kind and state of the shard, or None."""
    for place in places:
        try:
            index = ShardIndex.from_bytes(storage.read_bytes(place))
            if index.meta["kind"] == kind and index.meta["stamp"] == stamp:
                return index
        except (ValueError, KeyError, OSError, DataError):
            continue  # absent; damaged or of another version is no better
    return None


def save(index: ShardIndex, places: Sequence[str]) -> str | None:
    """Writes to the first place that can be written to and returns it; None if none can."""
    data = index.to_bytes()
    for place in places:
        try:
            storage.write_bytes(place, data)
            return place
        except OSError:
            continue
    return None
