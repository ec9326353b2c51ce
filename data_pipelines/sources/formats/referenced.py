"""Images and videos that a record names or holds: read while a shard is indexed, and read again as indexed."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterator, Sequence

from data_pipelines.io import blobs, paths
from data_pipelines.io.storage import Questions
from data_pipelines.records import image_header
from data_pipelines.records.pictures import Reference
from data_pipelines.records.raw_sample import Video
from data_pipelines.records.video.frames import Sampling, VideoFile, read_frames, read_header
from data_pipelines.sources.formats.asking import ask
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import ImagePart
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.unchanged import changed


def root_of(shard: Shard) -> str:
    """The folder of images given by name."""
    root = getattr(shard.options, "image_root", None)
    return paths.parent(shard.path) if root is None else root


def new_images(
    shard: Shard, refs: Sequence[Reference], questions: Questions, row: int = 0
) -> tuple[list[ImagePart], list[bytes]]:
    """(the images and frames to be indexed, at offset ``row``; the data for their hash).

    Raises BadSample "missing_image", "missing_video", ``UNASKED``, "image_too_many_bytes", or like ``read_header`` for
    images and for videos.
    """
    parts: list[ImagePart] = []
    contents: list[bytes] = []
    for ref, frame in _frames_apart(shard, refs):
        path = "" if isinstance(ref, bytes) else _path(shard, ref)
        if isinstance(ref, Video):
            look = functools.partial(_frames_of, ref, path, shard.options.sampling, row)
            found, content = ask(questions, look, "missing_video", paths.web_host(path))
            parts += found
        else:
            read = functools.partial(_read, path)
            content = ref if isinstance(ref, bytes) else ask(questions, read, "missing_image", paths.web_host(path))
            image_header.check_length(len(content))
            parts.append(ImagePart(row, len(content), image_header.read_header(content).size, frame=frame))
        contents.append(content)
    return parts, contents


def indexed_images(shard: Shard, refs: Sequence[Reference], entry: Entry) -> tuple[bytes, ...]:
    """The images and frames as indexed. Raises StorageError if one is gone or has another length."""
    places = iter(entry.image_places())
    found: list[bytes] = []
    for ref, _ in _frames_apart(shard, refs):
        _, length = next(places, (0, -1))
        if isinstance(ref, Video):
            frames = _indexed_frames(shard, ref, length)
            found += frames
            next(itertools.islice(places, len(frames) - 1, len(frames) - 1), None)  # the others' places
        else:
            found.append(_indexed(shard, ref, length))
    if len(found) != entry.image_count:
        raise changed(shard.path, f"{len(found)} images, but {entry.image_count} were indexed")
    return tuple(found)


def _frames_apart(shard: Shard, refs: Sequence[Reference]) -> Iterator[tuple[Reference, int]]:
    """(image or video, 0); for a video given as images, (frame, its number from 1) for each frame that is used."""
    for ref in refs:
        if isinstance(ref, Video) and isinstance(ref.source, tuple):
            yield from ((name, number) for number, name in enumerate(shard.options.sampling.stills(ref.source), 1))
        else:
            yield ref, 0


def _path(shard: Shard, ref: str | Video) -> str:
    """The path of what a record names; empty for a video that it holds."""
    name = ref.source if isinstance(ref, Video) else ref
    return paths.join(root_of(shard), name) if isinstance(name, str) else ""


def _video(ref: Video, path: str) -> VideoFile | io.BytesIO:
    return VideoFile(path) if isinstance(ref.source, str) else io.BytesIO(ref.source)


def _frames_of(ref: Video, path: str, sampling: Sampling, row: int) -> tuple[list[ImagePart], bytes]:
    with _video(ref, path) as file:
        header = read_header(file)
        length = file.seek(0, io.SEEK_END)
        count = len(sampling.times(header, ref))
        parts = [ImagePart(row, length, header.size, frame=number) for number in range(1, count + 1)]
        if isinstance(ref.source, bytes):
            return parts, ref.source
        return parts, (blobs.content_mark(path) or paths.stamp(path)).encode()


def _indexed_frames(shard: Shard, ref: Video, length: int) -> list[bytes]:
    path = _path(shard, ref)
    with _video(ref, path) as file:
        size = file.seek(0, io.SEEK_END)
        if size != length:
            raise changed(path or shard.path, f"{size} bytes, but {length} were indexed")
        return read_frames(file, shard.options.sampling.times(read_header(file), ref))


def _indexed(shard: Shard, ref: str | bytes, length: int) -> bytes:
    path = shard.path if isinstance(ref, bytes) else paths.join(root_of(shard), ref)
    data = ref if isinstance(ref, bytes) else _read(path)
    if len(data) != length:
        raise changed(path, f"{len(data)} bytes, but {length} were indexed")
    return data


def _read(path: str) -> bytes:
    return blobs.read_bytes(path, image_header.MAX_IMAGE_BYTES + 1)
