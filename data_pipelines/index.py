"""Makes the indices of shards: ``python -m data_pipelines.index SHARDS... --json``.

An index lies beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that place cannot
be written to. It is made again when its shard has changed. Shards are indexed in parallel; an interrupted run goes on
where it stopped, since finished indices are kept.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any

from data_pipelines import shard_index, storage
from data_pipelines.errors import DataError
from data_pipelines.shard_index import ShardIndex

# Kind of source -> module in data_pipelines.formats, and the options of its ``scan``.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tar": ("tar", ("caption_key", "hash_images")),
    "files": ("files", ("caption_key", "hash_images")),
    "parquet": ("parquet", ("caption_key", "image_key", "hash_images")),
    "jsonl": ("jsonl", ("image_root", "caption_key", "hash_images")),
    "text": ("plain", ("chunk_bytes",)),
    "array_record": ("array_record", ("caption_key", "hash_images")),
}
_SUFFIXES = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """A shard to be indexed: its kind, its place, and the options that decide the index's content."""

    kind: str
    path: str
    options: tuple[tuple[str, Any], ...] = ()


def format_module(kind: str) -> ModuleType:
    return importlib.import_module(f"data_pipelines.formats.{FORMATS[kind][0]}")


def kind_of(path: str) -> str:
    """The kind of source that a path's name suggests. Raises DataError."""
    if storage.is_dir(path):
        return "files"
    for suffix in PurePosixPath(path).suffixes[::-1]:
        name = re.sub(r"-\d+-of-\d+$", "", suffix.lower())
        if name in _SUFFIXES:
            return _SUFFIXES[name]
    raise DataError(f"{path}: unknown kind of shard; known: a folder, {', '.join(sorted(_SUFFIXES))}")


def shard_specs(kind: str, paths: Sequence[str], options: Mapping[str, Any]) -> list[ShardSpec]:
    """One spec for each path; options that are None or False count as not given."""
    given = tuple(sorted((k, v) for k, v in options.items() if k in FORMATS[kind][1] and v not in (None, False)))
    return [ShardSpec(kind, path, given) for path in paths]


def load_or_make(spec: ShardSpec, index_dir: str | None = None, force: bool = False) -> tuple[ShardIndex, bool]:
    """(the shard's index, whether it had to be made). Raises DataError if the shard cannot be opened."""
    options = dict(spec.options)
    places = shard_index.index_path(spec.path, {"kind": spec.kind, **options} if options else {}, index_dir)
    try:
        stamp = format_stamp(spec)
    except OSError as error:
        raise DataError(f"{spec.path}: cannot be read ({error})") from None
    if not force and (index := shard_index.load_fresh(places, stamp)) and index.meta["kind"] == spec.kind:
        return index, False
    index = format_module(spec.kind).scan(spec.path, {"kind": spec.kind, "stamp": stamp}, **options)
    shard_index.save(index, places)
    return index, True


def format_stamp(spec: ShardSpec) -> str:
    module = format_module(spec.kind)
    return module.stamp(spec.path) if hasattr(module, "stamp") else storage.stamp(spec.path)
