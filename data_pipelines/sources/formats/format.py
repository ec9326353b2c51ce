"""The interface of a storage format: how shards are found among paths, stamped, scanned into an index, and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import blobs, paths
from data_pipelines.io.digests import digest
from data_pipelines.records import names
from data_pipelines.records.layouts import Reading, parse
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.conversion.converted import converted, plain_name, suffix_of
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import IndexBuilder
from data_pipelines.sources.indices.shard import Options, Shard, VideoOptions
from data_pipelines.sources.indices.shard_index import ShardIndex
from data_pipelines.sources.indices.unchanged import changed
from data_pipelines.sources.selection.share import Share


class Format(Protocol):
    """One storage format.

    Attributes:
      kind: its name in the spec of a source.
      suffixes: of its shards' names; empty if names say nothing.
      options: the options with which its shards can be read.
      key_separator: between the shard's name and the sample's own key.
    """

    kind: str
    suffixes: tuple[str, ...]
    options: type[Options]
    key_separator: str

    def find(self, paths: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[Shard, Share]]:
        """(shard, how much of it is offered) for the paths. Raises DataError."""
        ...

    def shard(self, path: str, options: Mapping[str, Any]) -> Shard:
        """A shard with those of ``options`` that the format supports."""
        ...

    def stamp(self, shard: Shard) -> str:
        """Changes when the shard does. Raises StorageError if it does not exist."""
        ...

    def contents(self, shard: Shard) -> list[str]:
        """Marks of the shard's content, that of its own file first: unchanged if only times have changed.

        Empty if a shard is not one local file. Raises StorageError.
        """
        ...

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """Adds all samples of a shard to its index, bad ones with their reasons.

        Raises DataError if it is not a shard of this format, StorageError if it cannot be read.
        """
        ...

    def ask_again(self, shard: Shard, index: ShardIndex, builder: IndexBuilder) -> None:
        """Like ``scan``, if ``index`` is up to date except for samples some of whose files did not answer."""
        ...

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """The images or the text of a sample, or both. Raises BadSample, or StorageError."""
        ...

    def forget(self) -> None:
        """Closes everything that is kept open, since it may be stale."""
        ...


class FileFormat:
    """The common parts of ``Format``s in which every path is a shard and a file."""

    kind: str
    suffixes: tuple[str, ...] = ()
    options: type[Options]
    key_separator = "/"

    def find(self, paths: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[Shard, Share]]:
        for path in paths:
            yield from ((self.converted(file, options), Share()) for file in self.files_of(path))

    def files_of(self, path: str) -> list[str]:
        """The shards that a path stands for: itself or, for a folder, the files in and below it with matching names.

        Raises DataError if there are none.
        """
        if not self.suffixes or suffix_of(plain_name(path)) in self.suffixes or not paths.is_dir(path):
            return [path]
        folders = paths.walk(path)
        files = [paths.join(folder, name) for folder in folders for name, _, _ in paths.list_dir(folder)]
        found = [file for file in files if suffix_of(plain_name(file)) in self.suffixes]
        if not found:
            raise DataError(f"{path}: a folder without files of kind {self.kind!r} ({', '.join(self.suffixes)})")
        return sorted(found)

    def converted(self, path: str, options: Mapping[str, Any]) -> Shard:
        """The shard of a path, or of the file to which it had to be converted."""
        try:
            place = converted(path, self.kind)
        except StorageError:  # reading the shard will find out, and wait
            return self.shard(path, options)
        except DataError as error:
            return dataclasses.replace(self.shard(path, options), fault=str(error))
        if place == path:
            return self.shard(path, options)
        root = options.get("image_root") or paths.parent(path)
        return dataclasses.replace(self.shard(place, {**options, "image_root": root}), origin=path)

    def shard(self, path: str, options: Mapping[str, Any]) -> Shard:
        names = {field.name for field in dataclasses.fields(self.options)}
        given = {name: value for name, value in options.items() if name in names and value is not None}
        return Shard(self.kind, path, self.options(**given))

    def stamp(self, shard: Shard) -> str:
        return paths.stamp(shard.path)

    def contents(self, shard: Shard) -> list[str]:
        mark = blobs.content_mark(shard.path)
        return [mark] if mark else []

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        raise NotImplementedError

    def ask_again(self, shard: Shard, index: ShardIndex, builder: IndexBuilder) -> None:
        self.scan(shard, builder)

    def forget(self) -> None:
        blobs.close_blobs()


class ByteRangeFormat(FileFormat):
    """A format whose images and texts are byte ranges of the shard."""

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """Reads both together, since they are adjacent: in a remote shard they cost one request."""
        places = [*(entry.image_places() if images else ()), *([entry.text_place()] if text else ())]
        found = read_ranges(shard, places)
        sample = parse(entry.text_form, found.pop(), reading_of(shard.options, entry.key)) if text else RawSample()
        return dataclasses.replace(sample, images=tuple(found)) if found else sample


def read_ranges(shard: Shard, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes at each (offset, length) given by the index. Raises StorageError if they are not there."""
    found = blobs.blob(shard.path).read_all(places)
    for data, (offset, length) in zip(found, places):
        if len(data) != length:
            raise changed(shard.path, f"{len(data)} of {length} bytes at byte {offset}")
    return found


def reading_of(options: Options, key: str, images: int | None = None, videos: int = 0) -> Reading:
    """How the record of the sample ``key`` is read.

    images, videos: how many come with the record from elsewhere; None = it names its own.
    """
    image_key = getattr(options, "image_key", None)
    return Reading(
        getattr(options, "caption_key", None),
        (image_key.lower(), image_key) if image_key else names.IMAGE_FIELDS,
        images,
        videos if isinstance(options, VideoOptions) else None,
        key=key,
        seed=getattr(options, "caption_seed", None) or 0,
    )


def folder_stamp(folder: str) -> str:
    """Changes when any file directly in the folder does."""
    return digest(*(f"{name} {mark}" for name, _, mark in paths.list_dir(folder)))
