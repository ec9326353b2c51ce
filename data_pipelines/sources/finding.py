"""Finding shards: their kinds, the shards that a folder or a meta file stands for, and their names in keys."""

from __future__ import annotations

import dataclasses
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import blobs, paths
from data_pipelines.sources.containers.internvl_meta import meta_entries
from data_pipelines.sources.containers.members import is_image, medium_of, split_key
from data_pipelines.sources.conversion.converted import plain_name, suffix_of
from data_pipelines.sources.conversion.json_shapes import is_set
from data_pipelines.sources.conversion.tables import holds_records
from data_pipelines.sources.formats.files import folders_of_samples
from data_pipelines.sources.formats.registry import FORMATS
from data_pipelines.sources.indices.shard import Shard

_SHARDS = frozenset(
    [
        ".tar",
        ".tgz",
        ".jsonl",
        ".ndjson",
        ".tsv",
        ".array_record",
        ".arrow",
        ".feather",
        ".mds",
        ".tfrecord",
        ".tfrecords",
    ]
)
_MOST_LOOKED_AT = 100  # JSON and CSV files of a folder that are examined for the records of a set
_LOOKED_AT = 1 << 26  # bytes of each
_METADATA = (
    "metadata.jsonl",
    "metadata.csv",
    "metadata.parquet",
)  # these hold the texts of the images beside and below them


def make_shard(kind: str, path: str, **options: Any) -> Shard:
    """A shard of that kind; options of other kinds are dropped."""
    return FORMATS[kind].shard(path, options)


def kind_of(path: str) -> str:
    """The kind of source that a path's name suggests. Raises DataError."""
    if paths.is_dir(path):
        prepared, saved = (paths.exists(paths.join(path, name)) for name in ("dataset_info.json", "state.json"))
        # Hugging Face data sets also have such a file beside their Arrow files.
        arrow = prepared and any(name.endswith(".arrow") for name, _, _ in paths.list_dir(path))
        return "tfds" if prepared and not saved and not arrow else "files"
    suffix = suffix_of(plain_name(path))
    for kind, form in FORMATS.items():
        if suffix in form.suffixes:
            return kind
    known = ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)
    raise DataError(f"{path}: unknown kind of shard; give a folder or one of {known}, or set --kind")


def shards_of(patterns: Iterable[str], kind: str | None, options: Mapping[str, Any]) -> list[Shard]:
    """Shards in the order of ``patterns`` (globs allowed), the kind of each from its name unless given.

    A folder stands for the shards in and below it; if it holds loose files, it is itself a shard. Files of unknown kind
    that a glob matches beside shards (statistics, indices) are left out. Raises DataError if nothing is found.
    """
    shards: dict[Shard, None] = {}
    for pattern in patterns:
        found = paths.expand(pattern)
        for path in found:
            try:
                for each, its_kind in [(path, kind)] if kind else _shards_in(path):
                    shards.update((shard, None) for shard in _found(each, its_kind, options, within=each != path))
            except DataError:
                if len(found) == 1:
                    raise
    if not shards:
        raise DataError(f"{', '.join(map(str, patterns))}: no shards found{_instead(patterns)}")
    return list(shards)


def _found(path: str, kind: str, options: Mapping[str, Any], within: bool) -> Iterator[Shard]:
    """The shards of a path. ``within`` a folder, an unreadable file is a shard with a fault. Raises DataError."""
    try:
        yield from [shard for shard, _ in FORMATS[kind].find([path], options)]
    except StorageError:
        raise
    except DataError as error:
        if not within:
            raise
        yield dataclasses.replace(FORMATS[kind].shard(path, options), fault=str(error))


def _instead(patterns: Iterable[str]) -> str:
    """What the first non-empty folder contains instead, and what to do."""
    advice = "; set its kind with --kind"
    for path in (path for pattern in patterns for path in paths.expand(pattern) if paths.is_dir(path)):
        for folder in paths.walk(path):
            if found := [paths.join(folder, name) for name, _, _ in paths.list_dir(folder)]:
                return (
                    f": {len(found)} files such as {found[0]}; name the files themselves, or set their kind with --kind"
                )
    return advice


def _shards_in(path: str) -> list[tuple[str, str]]:
    """(path, kind) of the shards that a path stands for."""
    kind = kind_of(path)
    if kind != "files":
        return [(path, kind)]
    folders = paths.walk(path)
    files = [paths.join(folder, name) for folder in folders for name, _, _ in paths.list_dir(folder)]
    # img2dataset writes a metadata table beside each shard: 00000.parquet beside 00000.tar or the folder 00000.
    stems = {file.removesuffix(".tar") for file in files if file.endswith(".tar")} | set(folders)
    shards = [(f, kind_of(f)) for f in files if suffix_of(plain_name(f)) in _SHARDS]
    records = dict(found for folder in folders for found in _record_files(folder))
    listed = {paths.local_path(each) for annotations in records.values() for each in annotations}
    shards += [(file, "jsonl") for file in records]
    shards = [(file, kind) for file, kind in shards if paths.is_remote(file) or paths.local_path(file) not in listed]
    shards += [(f, "parquet") for f in files if f.endswith(".parquet") and f.removesuffix(".parquet") not in stems]
    described = tuple(f"{paths.parent(f)}/" for f in files if paths.basename(f) in _METADATA)
    loose = [folder for folder in folders_of_samples(folders) if not f"{folder}/".startswith(described)]
    return sorted([*shards, *((folder, "files") for folder in loose)])


def _record_files(folder: str) -> Iterator[tuple[str, list[str]]]:
    """(file, the annotations that it lists) for the JSON, CSV and YAML files in a folder that hold or list records.

    Files that belong to an image beside them are excluded.
    """
    names = [name for name, _, _ in paths.list_dir(folder)]
    keys = {split_key(name)[0] for name in names if is_image(name) or medium_of(name)}
    found = [name for name in names if suffix_of(plain_name(name)) in (".json", ".csv", ".yaml", ".yml")]
    for name in [name for name in found if split_key(name)[0] not in keys][:_MOST_LOOKED_AT]:
        path = paths.join(folder, name)
        if plain_name(name) != name:  # compressed
            yield path, []
            continue
        start = blobs.Blob(path).read(0, _LOOKED_AT)
        if name.lower().endswith(".csv"):
            holds, annotations = holds_records(path, start), []
        else:
            holds, annotations = _listed(path, start)
        if holds or annotations:
            yield path, annotations


def _listed(path: str, start: bytes) -> tuple[bool, list[str]]:
    """(whether a JSON or YAML file is part of a set, the annotations that it lists if it is a meta file or a mix)."""
    if path.lower().endswith(".json") and is_set(start):
        return True, []
    try:
        return False, [entry.annotation for entry in meta_entries(path) or ()]
    except DataError:  # opening it will say what is wrong with it
        return path.endswith(".json") or b"json_path" in start, []


def shard_names(shards: Sequence[str]) -> list[str]:
    """Names for keys: base names without suffix if these are unique, otherwise paths from the common folder on."""
    bases = [_stem(paths.basename(path)) for path in shards]
    if len(set(bases)) == len(bases):
        return bases
    common = posixpath.commonpath([paths.parent(path) for path in shards])
    names = [_stem(path.removeprefix(common).strip("/")) for path in shards]
    # A file listed twice (an annotation used with two image roots) is numbered, so that keys stay unique.
    counts: Counter[str] = Counter()
    for i, name in enumerate(names):
        counts[name] += 1
        if counts[name] > 1:
            names[i] = f"{name}~{counts[name]}"
    return names


def _stem(name: str) -> str:
    name = paths.join(paths.parent(name), plain_name(name))
    return name.removesuffix(".tar").removesuffix(".parquet").removesuffix(".array_record")
