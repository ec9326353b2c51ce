"""Sources of samples: random access to everything the trainer can read, behind one small interface.

``open_source({"kind": "tar", "paths": "shards/*.tar"})`` finds the shards, loads (or makes) their indices, joins
captions and applies the metadata filters; what is left is the list of usable samples, in a fixed order.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.index import FORMATS, ShardSpec, format_module, load_or_make, shard_stamp, source_shards
from data_pipelines.io import storage
from data_pipelines.sources import indexed
from data_pipelines.sources.captions import Captions, open_captions
from data_pipelines.sources.filters import Filters
from data_pipelines.sources.indexed import RawSample, Selection, Shard, Table
from data_pipelines.sources.shard_index import ShardIndex

__all__ = ["RawSample", "Source", "open_source"]

_log = logging.getLogger(__name__)
_PROBLEMS_LOGGED = 20  # at most, of a source
_COMMON_OPTIONS = ("kind", "name", "paths", "index_dir", "captions", "filters", "remote_cache_gb")
_THREADS = 16  # shards whose stamps and indices are fetched at a time, mostly waiting for remote storage
_TEXT_COLUMNS = {"text_chars": "chars", "script": "script", "text_hash": "text_hash"}  # of an index: of captions
# Samples that a joined caption makes usable.
_MENDED_BY_CAPTION = ("no_caption", "caption_not_utf8", "text_too_large", "broken_json")


class Source(Protocol):
    """Random access to n usable samples; thread-safe, and safe to fork or pickle into other processes."""

    name: str
    is_remote: bool  # whether a read is mostly waiting, so that several at a time are faster

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

    def problems(self) -> dict[str, list[str]]:
        """What is wrong with shards as a whole (cut off, unfinished, ...), in words, by path."""
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
    Shards that are damaged or unfinished as a whole are logged as warnings; ``problems`` lists them all.
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
    table, fingerprint, dropped, problems = _table(members, names, filters, captions, spec.get("index_dir"))
    _warn(problems)
    if not len(table):
        raise DataError(f"{what}: no usable sample in {len(shards)} shard(s); dropped: {dropped}")
    return format_module(kind).Source(name, shards, table, fingerprint, dropped, captions, problems)


def _warn(problems: Mapping[str, Sequence[str]]) -> None:
    """Logs what is wrong with shards, one line each as long as they are few."""
    told = [(path, problem) for path, found in problems.items() for problem in found]
    for path, problem in told[:_PROBLEMS_LOGGED]:
        _log.warning("%s: %s", path, problem)
    if len(told) > _PROBLEMS_LOGGED:
        _log.warning("%d problems more: python -m data_pipelines.index lists all", len(told) - _PROBLEMS_LOGGED)


def _table(
    members: Sequence[tuple[ShardSpec, float]],
    names: Sequence[str],
    filters: Filters,
    captions: Captions | None,
    index_dir: str | None,
) -> tuple[Table, str, dict[str, int], dict[str, list[str]]]:
    """(table of the offered samples, fingerprint, dropped by reason, problems by shard), from the cache if there."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(lambda member: shard_stamp(member[0]), members))
    state = [[m.path, m.options, repeat, stamp] for (m, repeat), stamp in zip(members, stamps)]
    identity = [state, names, filters.options, captions.digest if captions else "", indexed.VERSION]
    kept = storage.cache_dir() / "sources" / storage.digest(json.dumps(identity, sort_keys=True))
    try:
        table, header = Table.load(kept)
        return table, header["fingerprint"], header["dropped"], header["problems"]
    except (OSError, ValueError, KeyError):
        pass  # not made yet
    dropped: Counter[str] = Counter()
    problems: dict[str, list[str]] = {}
    content = storage.Digest()
    content.add(captions.digest if captions else "")
    unique = _unique(members, names, filters, captions, index_dir)

    def selections() -> Iterator[Selection]:
        for (member, times), name, index in zip(members, names, _indices(members, index_dir)):
            selection, _, lost = _select(index, name, filters, captions)
            dropped.update(lost)
            if index.problems:
                problems[member.path] = index.problems
            if unique is not None:
                selection = selection.where(next(unique))
            selection = _repeat(selection, times)
            for part in (name, index.meta["digest"], selection.rows.tobytes()):
                content.add(part)
            yield selection

    storage.remove_stale(kept.parent)
    folder = storage.temporary_beside(kept)
    try:
        table = Table.build(selections(), folder)
        header = {"fingerprint": content.hex(), "dropped": dict(dropped + filters.dropped), "problems": problems}
        table = table.save(kept, header) if table.folder else table
        return table, header["fingerprint"], header["dropped"], problems
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _indices(members: Sequence[tuple[ShardSpec, float]], index_dir: str | None) -> Iterator[ShardIndex]:
    """The shards' indices in order, a few fetched ahead, so that their number does not matter for memory."""
    for future in storage.ahead(load_or_make, ((member, index_dir) for member, _ in members), _THREADS):
        yield future.result()[0]


def _unique(
    members: Sequence[tuple[ShardSpec, float]],
    names: Sequence[str],
    filters: Filters,
    captions: Captions | None,
    index_dir: str | None,
) -> Iterator[np.ndarray] | None:
    """For each shard, which of its selected samples are no duplicates (bool [k]); None if duplicates may stay."""
    if not filters.wants_unique:
        return None
    hashes = []
    trial = Filters(filters.options)  # whose counts are thrown away
    for name, index in zip(names, _indices(members, index_dir)):
        selection, text_hash, _ = _select(index, name, trial, captions)
        hashes.append((text_hash, index.columns["image_hash"][selection.rows]))
    mask = filters.unique(*(np.concatenate(column) for column in zip(*hashes)))
    return iter(np.split(mask, np.cumsum([len(text_hash) for text_hash, _ in hashes])[:-1]))


def _select(
    index: ShardIndex, name: str, filters: Filters, captions: Captions | None
) -> tuple[Selection, np.ndarray, Counter[str]]:
    """What is offered of a shard, the hashes of the captions, and the unusable samples by reason."""
    rows, joined, lost = _join(index, name, captions)
    text = {key: index.columns[key][rows] for key in _TEXT_COLUMNS}
    if joined is not None:
        text = {key: getattr(captions, column)[joined] for key, column in _TEXT_COLUMNS.items()}
    keep = filters.keep(index, rows, text)
    return Selection(index, rows, joined).where(keep), text["text_hash"][keep], lost


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
    return selection.where(chosen)


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
