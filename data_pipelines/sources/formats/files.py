"""Folders of loose files: img2dataset's ``files`` output (KEY.jpg, KEY.txt, KEY.json), any images with captions.

Every folder that holds files is one shard; the members of a sample are told by name as in tars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records.text_record import Record
from data_pipelines.sources.formats.tar import (
    IMAGE_EXTENSIONS,
    Group,
    add_sample,
    group_members,
    split_key,
    stats_problems,
)
from data_pipelines.sources.indexed import IndexedSource, Shard
from data_pipelines.sources.shard_index import IndexBuilder, ShardIndex

_NO_MEMBERS = ("_stats.json", ".parquet", ".npz", ".tar", ".jsonl", ".array_record")


def find(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Every folder at or below the paths that holds images."""
    for path in paths:
        if not storage.is_dir(path):
            raise DataError(f"{path}: not a folder, as kind 'files' needs")
        folders = folders_of_samples(storage.walk(path))
        if not folders:
            raise DataError(f"{path}: no images in it")
        yield from ((folder, {}, 1.0) for folder in folders)


def folders_of_samples(folders: Sequence[str]) -> list[str]:
    """Those of the folders that hold images."""
    return [folder for folder in folders if any(_is_image(name) for name, _, _ in storage.list_dir(folder))]


def _is_image(name: str) -> bool:
    return _is_member(name) and split_key(name)[1].rpartition(".")[2] in IMAGE_EXTENSIONS


def stamp(path: str, options: Mapping[str, Any]) -> str:
    """Hash of names, sizes and times of change of all files."""
    return storage.digest(*(f"{name} {mark}" for name, _, mark in storage.list_dir(path)))


class _FolderView(storage.ScanView):
    """The files of a folder as members of one archive: file i lies at offset i << 40."""

    def __init__(self, path: str):
        self.path = path
        self.entries = [entry for entry in storage.list_dir(path) if _is_member(entry[0])]
        self.size = len(self.entries) << 40

    def members(self) -> Iterator[tuple[str, int, int]]:
        for i, (name, size, _) in enumerate(self.entries):
            yield name, i << 40, size

    def read(self, offset: int, length: int) -> bytes:
        try:
            return storage.read_bytes(storage.join(self.path, self.name(offset)), length)
        except (DataError, OSError) as error:
            raise BadSample("unreadable", detail=str(error)) from None

    def name(self, offset: int) -> str:
        return self.entries[offset >> 40][0]


def _is_member(name: str) -> bool:
    """Not a hidden file, a shard of another kind, or one of those that lie beside samples: statistics, indices."""
    return not name.startswith((".", "_")) and not name.endswith(_NO_MEMBERS)


def scan(path: str, meta: Mapping[str, Any], caption_key: str | None = None, hash_images: bool = False) -> ShardIndex:
    """Indexes the files directly in a folder. Raises DataError if it cannot be listed."""
    builder = IndexBuilder()
    view = _FolderView(path)
    groups = [part for group in group_members(view.members()) for part in _parts(group, view)]
    for group in groups:
        add_sample(builder, view, group, caption_key, hash_images, view.name)
    builder.problems.extend(stats_problems(path, len(groups)))
    return builder.build(meta)


def _parts(group: Group, view: _FolderView) -> list[Group]:
    """Loose images without any text that share a stem (photo.jpg, photo.png) are samples of their own, by file name."""
    if group.caption or group.json or len(group.images) < 2:
        return [group]
    parts = []
    for offset, size in group.images:
        parts.append(Group(view.name(offset)))
        parts[-1].images.append((offset, size))
    return parts


class Source(IndexedSource):
    """Loose files. Keys are FOLDER/KEY."""

    def _record(self, shard: Shard, index: int) -> Record:
        name = self._table.strings("text_name")[index] if "text_name" in self._table.arrays else ""
        return self._parsed(shard, index, _file(shard, name) if name else b"")

    def _images(self, shard: Shard, index: int, record: Record) -> tuple[bytes, ...]:
        names = self._table.strings("image_name") if "image_name" in self._table.arrays else ()
        return tuple(_file(shard, names[i]) for i in self._image_range(index))


def _file(shard: Shard, name: str) -> bytes:
    return storage.read_bytes(storage.join(shard.path, name))
