"""Folders of loose files: img2dataset's ``files`` output (KEY.jpg, KEY.txt, KEY.json), any images with captions.

Every folder that holds files is one shard; its samples are distinguished by name, as in tars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import blobs, paths, publish
from data_pipelines.io.storage import Questions
from data_pipelines.records.layouts import parse
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.records.video.frames import VideoFile, VideoHeader, read_header
from data_pipelines.sources.containers.img2dataset import stats_problems
from data_pipelines.sources.containers.members import IGNORED, Group, group_members, is_image, medium_of
from data_pipelines.sources.conversion.json_shapes import is_set
from data_pipelines.sources.formats.asking import ask
from data_pipelines.sources.formats.format import FileFormat, folder_stamp, reading_of
from data_pipelines.sources.formats.tar import TarOptions, draft_of, frames_in
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import IndexBuilder
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.unchanged import changed
from data_pipelines.sources.selection.share import Share

# Files found beside samples: statistics, indices, shards of other kinds.
_NO_MEMBERS = ("_stats.json", ".parquet", ".npz", ".tar", ".jsonl", ".array_record")


class FilesFormat(FileFormat):
    """Loose files. Keys are FOLDER/KEY."""

    kind, options = "files", TarOptions

    def find(self, folders: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[Shard, Share]]:
        """Every folder at or below the paths that holds images or videos."""
        for path in folders:
            if not paths.is_dir(path):
                raise DataError(f"{path}: not a folder, as kind 'files' needs")
            if not (shards := folders_of_samples(paths.walk(path))):
                raise DataError(f"{path}: no images in it")
            yield from super().find(shards, options)

    def stamp(self, shard: Shard) -> str:
        return folder_stamp(shard.path)

    def contents(self, shard: Shard) -> list[str]:
        return []

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        view = _FolderView(shard.path)
        found = group_members(view.members(), shard.options.choice, builder.problems)
        sets = [group for group in found if _is_set(group, view)]
        if sets:
            problem = f"{len(sets)} files of records, such as {view.name(sets[0].json[0])}: read them as kind 'jsonl'"
            builder.problems.append(IGNORED + problem)
        groups = [part for group in found if group not in sets for part in _split_images(group, view)]
        for group in groups:
            builder.add(draft_of(group, view, shard.options, view.video_header, view.name))
        builder.problems.extend(stats_problems(shard.path, len(groups)))

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        sample = RawSample()
        if text:
            length = entry.text_place()[1]
            data = _read_file(shard, entry.text_name(), length) if entry.text_name() else b""
            sample = parse(entry.text_form, data, reading_of(shard.options, entry.key, *entry.counts()))
        if not images:
            return sample
        members = entry.members()
        stills = [_read_file(shard, member.name, member.length) for member in members if not member.frames]
        videos = (_video(shard, member.name, member.length) for member in members if member.frames)
        return dataclasses.replace(sample, images=(*stills, *frames_in(videos, shard.options.sampling)))


def folders_of_samples(folders: Sequence[str]) -> list[str]:
    """Those of the folders that hold images, videos or audio."""
    return [folder for folder in folders if _holds(folder, _is_medium)]


def _holds(folder: str, wanted: Callable[[str], object]) -> bool:
    """Whether the name of any file in a folder satisfies ``wanted``."""
    return any(wanted(name) for name, _, _ in paths.list_dir(folder))


def _is_medium(name: str) -> bool:
    return _is_member(name) and bool(is_image(name) or medium_of(name))


def _is_member(name: str) -> bool:
    """Whether a file is part of a sample: not hidden, not unfinished, and not one of the files beside samples."""
    return not name.startswith((".", "_")) and not name.endswith(_NO_MEMBERS) and not publish.is_temporary(name)


class _FolderView(blobs.ScanView):
    """The files of a folder as members of one archive: file i begins at offset i << 40."""

    def __init__(self, path: str):
        self.path, self._questions = path, Questions()
        self.entries = [entry for entry in paths.list_dir(path) if _is_member(entry[0])]
        self.size = len(self.entries) << 40

    def members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, bytes) of the files."""
        for i, (name, size, _) in enumerate(self.entries):
            yield name, i << 40, size

    def read(self, offset: int, length: int) -> bytes:
        """Raises BadSample "unreadable" (gone since it was listed) or ``UNASKED``, StorageError if storage is down."""
        path = paths.join(self.path, self.name(offset))
        return ask(self._questions, lambda: blobs.read_bytes(path, length), "unreadable")

    def video_header(self, offset: int, size: int) -> VideoHeader:
        path = paths.join(self.path, self.name(offset))
        return ask(self._questions, lambda: read_header(VideoFile(path)), "unreadable")

    def name(self, offset: int) -> str:
        """The name of the file that begins at ``offset``."""
        return self.entries[offset >> 40][0]


def _is_set(group: Group, view: _FolderView) -> bool:
    """Whether a sample is a JSON file of many records that is beside images."""
    lone = group.json and not (group.images or group.videos or group.caption or group.problem)
    return bool(lone) and is_set(view.read(*group.json))


def _split_images(group: Group, view: _FolderView) -> list[Group]:
    """Loose images without text that share a stem (photo.jpg, photo.png) become separate samples, by file name."""
    if group.caption or group.json or len(group.images) < 2:
        return [group]
    parts = []
    for offset, size in group.images:
        parts.append(Group(view.name(offset)))
        parts[-1].images.append((offset, size))
    return parts


def _video(shard: Shard, name: str, length: int) -> VideoFile:
    """Like ``_read_file``, with random access."""
    file = VideoFile(path := paths.join(shard.path, name))
    if file.size != length:
        raise changed(path, f"{file.size} bytes, but {length} were indexed")
    return file


def _read_file(shard: Shard, name: str, length: int) -> bytes:
    """A file in the folder. Raises StorageError if its length is not that in the index."""
    path = paths.join(shard.path, name)
    data = blobs.read_bytes(path)
    if len(data) != length:
        raise changed(path, f"{len(data)} bytes, but {length} were indexed")
    return data
