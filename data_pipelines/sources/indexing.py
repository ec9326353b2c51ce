"""The indices of shards: loaded if they are fresh, made and kept otherwise.

An index is kept beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that place is
read-only. It is made again when its shard has changed.
"""

from __future__ import annotations

from data_pipelines.errors import DataError
from data_pipelines.sources.formats.registry import FORMATS
from data_pipelines.sources.indices import shard_index
from data_pipelines.sources.indices.index_builder import IndexBuilder
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.shard_index import ShardIndex


def shard_stamp(shard: Shard) -> str:
    """Changes when the shard does. Raises DataError if it is not there."""
    try:
        return FORMATS[shard.kind].stamp(shard)
    except OSError as error:
        raise DataError(f"{shard.path}: cannot be read ({error})") from None


def load_or_make(shard: Shard, index_dir: str | None = None, force: bool = False) -> tuple[ShardIndex, bool]:
    """(the shard's index, whether it was made now because it was missing, stale or ``force``).

    Raises DataError if the shard cannot be opened.
    """
    given = shard.options.given()
    candidates = shard_index.index_paths(shard.path, {"kind": shard.kind, **given} if given else {}, index_dir)
    stamp = shard_stamp(shard)
    if not force and (index := shard_index.load_fresh(candidates, shard.kind, stamp)):
        return index, False
    index = make_index(shard, stamp)
    shard_index.save(index, candidates)
    return index, True


def make_index(shard: Shard, stamp: str = "") -> ShardIndex:
    """Scans the shard. Raises DataError if it cannot be opened."""
    builder = IndexBuilder()
    try:
        FORMATS[shard.kind].scan(shard, builder)
    except OSError as error:
        raise DataError(f"{shard.path}: cannot be read ({error})") from None
    return builder.build({"kind": shard.kind, "stamp": stamp})
