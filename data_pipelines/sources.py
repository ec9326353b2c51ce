"""Sources of samples: random access to everything the trainer can read, behind one small interface.

``open_source({"kind": "tar", "paths": "shards/*.tar"})`` finds the shards, loads (or makes) their indices, applies the
metadata filters and joins captions; what is left is the list of usable samples, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines import storage
from data_pipelines.errors import BadSample, DataError, check_keys, did_you_mean
from data_pipelines.index import FORMATS, ShardSpec, load_or_make, shard_specs
from data_pipelines.records import Record, parse
from data_pipelines.shard_index import ShardIndex, Strings


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


class Source(Protocol):
    """Random access to n usable samples; thread-safe, and safe to fork or pickle into other processes."""

    name: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """Sample ``index`` (0 <= index < n). Raises BadSample if it cannot be had."""
        ...

    def read_text(self, index: int) -> RawSample:
        """The same with ``images=()``: cheap, for counting tokens."""
        ...

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Upright sizes from the index: (counts int32 [k], sizes int32 [sum(counts), 2] width and height)."""
        ...

    def fingerprint(self) -> str:
        """Identity of the content: the same on every host and under every absolute path."""
        ...

    def dropped(self) -> dict[str, int]:
        """Number of samples that are not offered, by reason."""
        ...


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a source: where it lies, its name in keys, and its index."""

    path: str
    name: str
    index: ShardIndex
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class IndexedSource:
    """A source made of shards with indices. Formats say how the bytes of images and texts are fetched.

    The columns of all usable samples are kept concatenated in memory (about 60 bytes a sample).
    """

    def __init__(self, name: str, shards: Sequence[Shard], rows: Sequence[np.ndarray], dropped: Mapping[str, int]):
        self.name = name
        self.options = [shard.options for shard in shards]
        self.paths = [shard.path for shard in shards]
        self.shard_names = [shard.name for shard in shards]
        self._dropped = dict(dropped)
        self._fingerprint = storage.digest(name_free_identity(shards, rows))
        self._repeated = {s for s, r in enumerate(rows) if len(r) > len(shards[s].index)}
        self._ends = np.cumsum([len(r) for r in rows], dtype=np.int64)

        def column(key: str) -> np.ndarray:
            parts = [shard.index.columns[key][r] for shard, r in zip(shards, rows)]
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)

        self._rows = np.concatenate([np.zeros(0, np.int64), *rows])
        self._keys = Strings.concatenate([shard.index.keys.take(r) for shard, r in zip(shards, rows)])
        self._text = tuple(column(key) for key in ("text_offset", "text_length", "text_form"))
        self.text_chars = column("text_chars")
        counts = column("image_count").astype(np.int32)
        self._image_ends = np.cumsum(counts, dtype=np.int64)
        self._image_counts = counts
        images = [_images_of(shard.index, r) for shard, r in zip(shards, rows)]
        self._image_offset = np.concatenate(
            [np.zeros(0, np.int64), *(s.index.columns["image_offset"][i] for s, i in zip(shards, images))]
        )
        self._image_length = np.concatenate(
            [np.zeros(0, np.int64), *(s.index.columns["image_length"][i] for s, i in zip(shards, images))]
        )
        self._image_size = np.concatenate(
            [np.zeros((0, 2), np.int32), *(s.index.columns["image_size"][i] for s, i in zip(shards, images))]
        )
        self._image_names = None
        if any(len(shard.index.image_name) for shard in shards):
            self._image_names = Strings.concatenate([s.index.image_name.take(i) for s, i in zip(shards, images)])

    def __len__(self) -> int:
        return len(self._rows)

    def shard_ranges(self) -> np.ndarray:
        """int64 [shards + 1]: samples of shard s are ranges[s] .. ranges[s + 1] - 1 (for reading in long runs)."""
        return np.concatenate([[0], self._ends])

    def key(self, index: int) -> str:
        shard = self._shard(index)
        return self._join_key(self.shard_names[shard], self._keys[index]) + self._repeat_mark(shard, index)

    def _join_key(self, shard: str, key: str) -> str:
        return f"{shard}/{key}"

    def _repeat_mark(self, shard: int, index: int) -> str:
        """What makes the key unique when ``repeat_time`` offers a sample again: "#2" the second time, and so on."""
        if shard not in self._repeated:
            return ""
        first = int(self._ends[shard - 1]) if shard else 0
        times = int(np.count_nonzero(self._rows[first:index] == self._rows[index])) + 1
        return f"#{times}" if times > 1 else ""

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"sample {index} of {len(self._rows)} in source {self.name}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def read(self, index: int) -> RawSample:
        index = int(index)
        sample, record = self._sample(index)
        try:
            images = self._images(index, record)
        except BadSample as error:
            raise BadSample(error.reason, sample.key, error.detail) from None
        except (OSError, DataError) as error:
            raise BadSample("unreadable", sample.key, str(error)) from None
        return dataclasses.replace(sample, images=images) if images else sample

    def read_text(self, index: int) -> RawSample:
        return self._sample(int(index))[0]

    def _sample(self, index: int) -> tuple[RawSample, Record]:
        key = self.key(index)
        try:
            record = self._record(index)
        except BadSample as error:
            raise BadSample(error.reason, key, error.detail) from None
        except (OSError, DataError) as error:
            raise BadSample("unreadable", key, str(error)) from None
        return RawSample(key, (), record.caption, record.conversations, record.text), record

    def _record(self, index: int) -> Record:
        return parse(
            int(self._text[2][index]),
            self._text_bytes(index),
            self.options[self._shard(index)].get("caption_key") or "caption",
        )

    def _text_bytes(self, index: int) -> bytes:
        return self._bytes(index, int(self._text[0][index]), int(self._text[1][index]))

    def _bytes(self, index: int, offset: int, length: int) -> bytes:
        data = storage.blob(self.paths[self._shard(index)]).read(offset, length)
        if len(data) != length:
            raise BadSample("truncated", detail=f"{len(data)} of {length} bytes at {offset}")
        return data

    def _images(self, index: int, record: Record) -> tuple[bytes, ...]:
        return tuple(
            self._bytes(index, int(self._image_offset[i]), int(self._image_length[i])) for i in self._image_range(index)
        )

    def _image_range(self, index: int) -> range:
        end = int(self._image_ends[index])
        return range(end - int(self._image_counts[index]), end)

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        counts = self._image_counts[indices]
        ends = np.cumsum(counts, dtype=np.int64)
        starts = self._image_ends[indices] - counts
        gather = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        return counts, self._image_size[gather]

    def fingerprint(self) -> str:
        return self._fingerprint

    def dropped(self) -> dict[str, int]:
        return dict(self._dropped)


def name_free_identity(shards: Sequence[Shard], rows: Sequence[np.ndarray]) -> str:
    """What the fingerprint is made of: names and content of the shards and which of their rows are offered."""
    return "\n".join(
        f"{shard.name} {shard.index.meta['digest']} {storage.digest(np.ascontiguousarray(r, np.int64).tobytes())}"
        for shard, r in zip(shards, rows)
    )


def _images_of(index: ShardIndex, rows: np.ndarray) -> np.ndarray:
    """Rows of the image columns that belong to the samples ``rows``."""
    counts = index.columns["image_count"].astype(np.int64)
    ends = np.cumsum(counts)
    counts, starts = counts[rows], (ends - counts)[rows]
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


class TarSource(IndexedSource):
    """Tars read in place: images and texts by offset."""


class TextSource(IndexedSource):
    """Pieces of plain text files. Keys are FILE:PIECE."""

    def _join_key(self, shard: str, key: str) -> str:
        return f"{shard}:{key}"


class JsonlSource(IndexedSource):
    """Lines of JSONL files, whose images are files of their own. Keys are FILE:LINE."""

    def _join_key(self, shard: str, key: str) -> str:
        return f"{shard}:{key}"

    def _images(self, index: int, record: Record) -> tuple[bytes, ...]:
        from data_pipelines.formats.jsonl import read_image

        shard = self._shard(index)
        root = self.options[shard].get("image_root")
        root = storage.parent(self.paths[shard]) if root is None else root
        return tuple(read_image(storage.join(root, name)) for name in record.images)


_CLASSES = {"tar": TarSource, "text": TextSource, "jsonl": JsonlSource}
_COMMON_OPTIONS = ("kind", "name", "paths", "index_dir")


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens a source; indices that are missing or stale are made.

    Args:
      spec: "kind" (tar, files, parquet, jsonl, text, array_record, tfds) and "paths" (a path, URL or glob, or a list of
        them); optionally "name", "index_dir" (where indices lie, if not beside the shards) and the kind's own options.
    Raises: DataError: unknown kind or key (with the nearest valid one), paths that match nothing, nothing usable.
    """
    kind = spec.get("kind")
    if kind not in FORMATS:
        raise DataError(f"source: unknown kind {kind!r}; {did_you_mean(kind, FORMATS)}")
    name = str(spec.get("name") or kind)
    check_keys(spec, (*_COMMON_OPTIONS, *FORMATS[kind][1]), f"source {name!r} of kind {kind!r}")
    if not spec.get("paths"):
        raise DataError(f"source {name!r}: no paths; set 'paths' to a file, a glob or a list of them")
    shards, rows, dropped = [], [], Counter()
    members = _members(kind, storage.expand(spec["paths"]), spec)
    for (member, repeat), shard_name in zip(members, shard_names([m.path for m, _ in members])):
        index, _ = load_or_make(member, spec.get("index_dir"))
        shards.append(Shard(member.path, shard_name, index, dict(member.options)))
        rows.append(_repeat(index.usable, repeat))
        dropped.update(index.dropped())
    source = _CLASSES[kind](name, shards, rows, dropped)
    if not len(source):
        raise DataError(f"source {name!r}: no usable sample in {len(shards)} shard(s); dropped: {dict(dropped)}")
    return source


def _members(kind: str, paths: Sequence[str], spec: Mapping[str, Any]) -> list[tuple[ShardSpec, float]]:
    """The shards of a source and how often each is offered; InternVL meta files are replaced by what they list."""
    if kind != "jsonl":
        return [(s, 1.0) for s in shard_specs(kind, paths, spec)]
    from data_pipelines.formats.jsonl import meta_entries

    members: list[tuple[ShardSpec, float]] = []
    for path in paths:
        entries = meta_entries(path)
        if entries is None:
            members.extend((s, 1.0) for s in shard_specs(kind, [path], spec))
        for entry in entries or ():
            options = {**spec, "image_root": entry.root}
            members.extend((s, entry.repeat_time) for s in shard_specs(kind, [entry.annotation], options))
    return members


def _repeat(rows: np.ndarray, times: float) -> np.ndarray:
    """``rows`` whole as often as ``times`` says, and evenly spread ones for its fraction."""
    whole = int(times)
    part = round((times - whole) * len(rows))
    spread = rows[np.arange(part) * len(rows) // max(part, 1)]
    return np.concatenate([*[rows] * whole, spread]).astype(np.int64)


def shard_names(paths: Sequence[str]) -> list[str]:
    """Names for keys: base names without suffix where these are unique, otherwise paths from the common folder on."""
    bases = [storage.basename(p).removesuffix(".tar").removesuffix(".parquet") for p in paths]
    if len(set(bases)) == len(bases):
        return bases
    common = os.path.commonpath([storage.parent(p) for p in paths]) if len(paths) > 1 else ""
    return [p.removeprefix(common).lstrip("/").removesuffix(".tar").removesuffix(".parquet") for p in paths]
