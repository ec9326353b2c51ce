"""Images that a record names or holds: read while a shard is indexed, and again as the index knows them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from data_pipelines.io import blobs, paths
from data_pipelines.io.storage import Questions
from data_pipelines.records import image_header
from data_pipelines.records.pictures import Reference
from data_pipelines.sources.formats.asking import ask
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.unchanged import changed


def root_of(shard: Shard) -> str:
    """The folder of the images that are named."""
    root = getattr(shard.options, "image_root", None)
    return paths.parent(shard.path) if root is None else root


def new_images(shard: Shard, refs: Sequence[Reference], questions: Questions) -> list[bytes]:
    """The images, to be indexed. Raises BadSample "missing_image", ``UNASKED`` or "image_too_many_bytes"."""
    images = []
    for ref in refs:
        if isinstance(ref, bytes):
            images.append(ref)
        else:
            path = paths.join(root_of(shard), ref)
            read = functools.partial(_read, path)
            images.append(ask(questions, read, "missing_image", paths.web_host(path)))
        image_header.check_length(len(images[-1]))
    return images


def indexed_images(shard: Shard, refs: Sequence[Reference], lengths: Sequence[int]) -> tuple[bytes, ...]:
    """The images, as the index knows them. Raises StorageError if one is gone, or has another length."""
    if len(lengths) != len(refs):
        raise changed(shard.path, f"{len(refs)} images, {len(lengths)} were indexed")
    return tuple(_indexed(shard, ref, length) for ref, length in zip(refs, lengths))


def _indexed(shard: Shard, ref: Reference, length: int) -> bytes:
    path = shard.path if isinstance(ref, bytes) else paths.join(root_of(shard), ref)
    data = ref if isinstance(ref, bytes) else _read(path)
    if len(data) != length:
        raise changed(path, f"{len(data)} bytes, {length} were indexed")
    return data


def _read(path: str) -> bytes:
    return blobs.read_bytes(path, image_header.MAX_IMAGE_BYTES + 1)
