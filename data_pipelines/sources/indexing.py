"""The indices of shards: loaded if they are up to date, otherwise built and stored.

An index is kept beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that location
is read-only. It is rebuilt when the content of its shard has changed (a new modification time by itself does not
count), or when a package has been installed that was missing for reading some images.
Samples whose files did not answer when they were indexed are requested again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.io import paths
from data_pipelines.io.storage import patiently
from data_pipelines.records.extra_formats import now_readable
from data_pipelines.sources.formats.registry import FORMATS
from data_pipelines.sources.indices import shard_index
from data_pipelines.sources.indices.index_builder import IndexBuilder
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.shard_index import ShardIndex


def shard_stamp(shard: Shard) -> str:
    """Changes when the shard does. Raises StorageError if it does not exist."""
    return patiently(lambda: FORMATS[shard.kind].stamp(shard))


def with_mark(shard: Shard) -> Shard:
    """The shard with its ``mark``. Raises StorageError if it does not exist."""
    local = not paths.is_remote(shard.path) and not paths.is_dir(shard.path)
    return dataclasses.replace(shard, mark=patiently(lambda: paths.stamp(shard.path)) if local else "")


def load_or_make(
    shard: Shard, index_dir: str | None = None, force: bool = False, ask_again: bool = True
) -> tuple[ShardIndex, bool]:
    """(the shard's index, whether it was built now because it was missing or stale, or because of ``force``).

    ``ask_again``: whether files that did not answer when the index was built are requested again.

    Raises DataError, StorageError if the shard cannot be opened.
    """
    given = shard.options.given()
    candidates = shard_index.index_paths(shard.path, {"kind": shard.kind, **given} if given else {}, index_dir)
    stamp = shard_stamp(shard)
    index = None if force else _fresh(shard, candidates, stamp)
    if index is None:
        index = make_index(shard, stamp)
        shard_index.save(index, candidates)
        return index, True
    if ask_again and len(index.unasked):
        index = _asked_again(shard, index, candidates)
    return index, False


def make_index(shard: Shard, stamp: str = "") -> ShardIndex:
    """Scans the shard. Raises DataError, StorageError if it cannot be opened."""
    return patiently(lambda: _scanned(shard, stamp))


def _scanned(shard: Shard, stamp: str) -> ShardIndex:
    if shard.fault:
        raise DataError(shard.fault)
    form, builder = FORMATS[shard.kind], IndexBuilder()
    contents = form.contents(shard)
    form.scan(shard, builder)
    if not len(builder) and not builder.problems:
        builder.problems.append("empty: there is no sample in it")
    return builder.build({"kind": shard.kind, "stamp": stamp, "contents": contents})


def _fresh(shard: Shard, candidates: Sequence[str], stamp: str) -> ShardIndex | None:
    """The stored index, if it matches the shard in its current state."""
    touched = []
    for index in shard_index.load_whole(candidates, shard.kind):
        if now_readable(index.reasons):
            continue
        if index.meta["stamp"] == stamp:
            return index
        if index.meta["contents"]:
            touched.append(index)
    contents = patiently(lambda: FORMATS[shard.kind].contents(shard)) if touched else []
    for index in touched:
        if index.meta["contents"] == contents:
            index.meta["stamp"] = stamp
            shard_index.save(index, candidates)
            return index
    return None


def _asked_again(shard: Shard, index: ShardIndex, candidates: Sequence[str]) -> ShardIndex:
    builder = IndexBuilder()
    patiently(lambda: FORMATS[shard.kind].ask_again(shard, index, builder))
    again = builder.build({name: index.meta[name] for name in ("kind", "stamp", "contents")})
    if len(again.unasked) < len(index.unasked):
        shard_index.save(again, candidates)
        return again
    return index
