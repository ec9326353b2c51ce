"""Sources of samples: random access to everything the trainer can read, behind one small interface.

``open_source({"kind": "tar", "paths": "shards/*.tar"})`` finds the shards, loads (or makes) their indices, joins
captions and applies the metadata filters; what is left is the list of usable samples, in a fixed order.
"""

from __future__ import annotations

import concurrent.futures
import json
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines import indexed, storage
from data_pipelines.captions import Captions, open_captions
from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.filters import Filters
from data_pipelines.index import FORMATS, ShardSpec, format_module, load_or_make, shard_stamp, source_shards
from data_pipelines.indexed import RawSample, Selection, Shard, Table
from data_pipelines.shard_index import ShardIndex

__all__ = ["RawSample", "Source", "open_source"]

_COMMON_OPTIONS = ("kind", "name", "paths", "index_dir", "captions", "filters", "remote_cache_gb")
_THREADS = 16  # shards whose stamps and indices are fetched at a time, mostly waiting for remote storage
# Samples that a joined caption makes usable.
_MENDED_BY_CAPTION = ("no_caption", "caption_not_utf8", "text_too_large", "broken_json")


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


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens a source; indices that are missing or stale are made.

    Args:
      spec: "kind" (tar, files, parquet, jsonl, text, array_record, tfds) and "paths" (a path, URL or glob, or a list of
        them). Optional: "name"; "index_dir" (where indices lie, if not beside the shards); "captions" (files of
        key -> caption that replace the samples' own; samples without one are dropped as "no_joined_caption"); "filters"
        (see ``filters.check_filters``); "remote_cache_gb" (read remote shards in pieces of 8 MiB that are kept on the
        local disk up to so many GB: for few hosts and shuffle "local"); and the options of the kind
        (``index.FORMATS``).
    Raises: DataError: unknown kind or key (with the nearest valid one), paths that match nothing, nothing usable.
    """
    kind = spec.get("kind")
    if kind not in FORMATS:
        raise DataError(f"source: unknown kind {kind!r}; {did_you_mean(kind, FORMATS)}")
    name = str(spec.get("name") or kind)
    what = f"source {name!r} of kind {kind!r}"
    check_keys(spec, (*_COMMON_OPTIONS, *FORMATS[kind].options), what)
    if not spec.get("paths"):
        raise DataError(f"{what}: no paths; set 'paths' to a file, a glob or a list of them")
    if size := spec.get("remote_cache_gb"):
        if isinstance(size, bool) or not isinstance(size, int | float) or size < 0:
            raise DataError(f"{what}: remote_cache_gb must be a number of gigabytes, is {size!r}")
        storage.cache_remote(size)
    filters = Filters(spec.get("filters"), what)
    captions = open_captions(spec["captions"]) if spec.get("captions") else None
    options = {**spec, "hash_images": True} if "unique_images" in filters.options else spec
    members = source_shards(kind, storage.expand(spec["paths"]), options)
    names = shard_names([member.path for member, _ in members])
    shards = [Shard(member.path, n, dict(member.options)) for (member, _), n in zip(members, names)]
    table, fingerprint, dropped = _table(members, names, filters, captions, spec.get("index_dir"))
    if not len(table):
        raise DataError(f"{what}: no usable sample in {len(shards)} shard(s); dropped: {dropped}")
    return format_module(kind).Source(name, shards, table, fingerprint, dropped, captions)


def _table(
    members: Sequence[tuple[ShardSpec, float]],
    names: Sequence[str],
    filters: Filters,
    captions: Captions | None,
    index_dir: str | None,
) -> tuple[Table, str, dict[str, int]]:
    """(table of the offered samples, fingerprint, dropped by reason), from the cache folder if it is there."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(lambda member: shard_stamp(member[0]), members))
        state = [[m.path, m.options, repeat, stamp] for (m, repeat), stamp in zip(members, stamps)]
        identity = [state, names, filters.options, captions.digest if captions else "", indexed.VERSION]
        folder = storage.cache_dir() / "sources" / storage.digest(json.dumps(identity, sort_keys=True))
        try:
            table, header = Table.load(folder)
            return table, header["fingerprint"], header["dropped"]
        except (OSError, ValueError, KeyError):
            pass  # not made yet
        indices = list(pool.map(lambda member: load_or_make(member[0], index_dir)[0], members))
    selections, dropped = _select(indices, names, filters, captions)
    selections = [_repeat(selection, times) for selection, (_, times) in zip(selections, members)]
    table = Table.build(selections)
    fingerprint = storage.digest(
        captions.digest if captions else "",
        *(part for name, s in zip(names, selections) for part in (name, s.index.meta["digest"], s.rows.tobytes())),
    )
    if len(table) >= indexed.TABLE_ROWS:
        table.save(folder, {"fingerprint": fingerprint, "dropped": dropped})
        table = Table.load(folder)[0]
    return table, fingerprint, dropped


def _select(
    indices: Sequence[ShardIndex], names: Sequence[str], filters: Filters, captions: Captions | None
) -> tuple[list[Selection], dict[str, int]]:
    """What is offered of each shard, and how many samples are not, by reason."""
    dropped: Counter[str] = Counter()
    selections, caption_hashes, image_hashes = [], [], []
    for index, name in zip(indices, names):
        rows, joined, lost = _join(index, name, captions)
        text = {key: index.columns[key][rows] for key in ("text_chars", "script", "text_hash")}
        if joined is not None:
            text = {"text_chars": captions.chars[joined], "script": captions.script[joined]}
            text["text_hash"] = captions.text_hash[joined]
        keep = filters.keep(index, rows, text)
        dropped.update(lost)
        selections.append(Selection(index, rows[keep], None if joined is None else joined[keep]))
        caption_hashes.append(text["text_hash"][keep])
        image_hashes.append(index.columns["image_hash"][rows[keep]])
    unique = filters.unique(np.concatenate(caption_hashes), np.concatenate(image_hashes))
    parts = np.split(unique, np.cumsum([len(s.rows) for s in selections])[:-1])
    selections = [
        Selection(s.index, s.rows[part], None if s.captions is None else s.captions[part])
        for s, part in zip(selections, parts)
    ]
    return selections, dict(dropped + filters.dropped)


def _join(
    index: ShardIndex, name: str, captions: Captions | None
) -> tuple[np.ndarray, np.ndarray | None, Counter[str]]:
    """(usable rows, their joined captions, unusable samples by reason) of a shard."""
    if captions is None:
        return index.usable, None, Counter(index.dropped())
    mended = [i + 1 for i, reason in enumerate(index.reasons) if reason in _MENDED_BY_CAPTION]
    reason, pictured = index.columns["reason"], index.columns["image_count"] > 0
    rows = np.flatnonzero(pictured & np.isin(reason, [0, *mended]))
    joined = captions.find(name, index.keys.take(rows))
    offered = np.zeros(len(index), bool)
    offered[rows] = True
    lost = Counter(index.reasons[r - 1] if r else "no_image" for r in reason[~offered].tolist())
    lost["no_joined_caption"] += int(np.count_nonzero(joined < 0))
    return rows[joined >= 0], joined[joined >= 0], +lost


def _repeat(selection: Selection, times: float) -> Selection:
    """The samples as often as ``times`` says whole, and evenly spread ones for its fraction."""
    if times == 1:
        return selection
    count = len(selection.rows)
    part = round((times - int(times)) * count)
    chosen = np.concatenate([*[np.arange(count)] * int(times), np.arange(part) * count // max(part, 1)]).astype(
        np.int64
    )
    joined = selection.captions
    return Selection(selection.index, selection.rows[chosen], None if joined is None else joined[chosen])


def shard_names(paths: Sequence[str]) -> list[str]:
    """Names for keys: base names without suffix where these are unique, otherwise paths from the common folder on."""
    bases = [_stem(storage.basename(path)) for path in paths]
    if len(set(bases)) == len(bases):
        return bases
    common = posixpath.commonpath([storage.parent(path) for path in paths])
    names = [_stem(path.removeprefix(common).strip("/")) for path in paths]
    # The same file listed twice (an annotation used with two image roots): numbered, so that keys stay unique.
    counts: Counter[str] = Counter()
    for i, name in enumerate(names):
        counts[name] += 1
        if counts[name] > 1:
            names[i] = f"{name}~{counts[name]}"
    return names


def _stem(name: str) -> str:
    return name.removesuffix(".tar").removesuffix(".parquet").removesuffix(".array_record")
