"""TFDS datasets in a random access format (ArrayRecord), read by ``as_data_source``: TensorFlow is never imported.

The path is the folder of a prepared dataset's version, the one with dataset_info.json in it. Images stay encoded. Of a
remote folder all files are copied to the cache folder when it is first read.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records import image_header as headers
from data_pipelines.records.text_record import Form, Record, from_object
from data_pipelines.sources.formats.parquet import IMAGE_COLUMNS
from data_pipelines.sources.indexed import IndexedSource, Shard
from data_pipelines.sources.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

_CAPTION_FIELDS = ("caption", "captions", "text", "description", "title")


def stamp(path: str, options: Mapping[str, Any]) -> str:
    """Hash of names, sizes and times of change of the dataset's files."""
    return storage.digest(*(f"{name} {mark}" for name, _, mark in storage.list_dir(path)))


@functools.lru_cache(maxsize=8)
def _open(path: str, split: str, thread: tuple[int, int]) -> tuple[Any, Mapping[str, Any]]:
    """(data source, features) of a split; one for each thread of each process."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(storage.local_folder(path))
        features = builder.info.features
        images = {name: tfds.decode.SkipDecoding() for name, f in features.items() if _holds_images(tfds, f)}
        return builder.as_data_source(split, decoders=images), features
    except Exception as error:  # tfds raises many kinds
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: split {split!r} cannot be opened as a TFDS data source ({message})") from None


def _holds_images(tfds: Any, feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image) or isinstance(
        getattr(feature, "feature", None), tfds.features.Image
    )


def _dataset(path: str, options: Mapping[str, Any]) -> tuple[Any, str | None, str | None]:
    """(data source, name of the image feature, name of the caption feature)."""
    thread = (os.getpid(), threading.get_ident())
    source, features = _open(path, options.get("split") or "train", thread)
    for option in ("image_key", "caption_key"):
        if (name := options.get(option)) and name.split("/")[0] not in features:
            raise DataError(f"{path}: no feature {name!r} for {option}; features: {', '.join(features)}")
    image = options.get("image_key") or next((name for name in IMAGE_COLUMNS if name in features), None)
    caption = options.get("caption_key") or next((name for name in _CAPTION_FIELDS if name in features), None)
    if caption is None:
        raise DataError(f"{path}: which feature is the caption? set caption_key to one of: {', '.join(features)}")
    return source, image, caption


def _caption(example: Mapping[str, Any], name: str) -> Record:
    """The caption at "feature" or "feature/inner"; of several captions the first."""
    value: Any = example
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("text")
    while isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadSample("caption_not_utf8", detail=str(error)) from None
    return from_object({"caption": value})


def _image_parts(example: Mapping[str, Any], name: str | None) -> tuple[bytes, ...]:
    value = example.get(name) if name else None
    if isinstance(value, bytes):
        return (value,)
    return tuple(item for item in value if isinstance(item, bytes)) if value is not None else ()


def scan(path: str, meta: Mapping[str, Any], hash_images: bool = False, **options: Any) -> ShardIndex:
    """Indexes a split by reading it once; a sample's offset is its number. Keys are these numbers.

    Raises DataError if the dataset is not prepared, is not in a random access format, or a feature is missing.
    """
    source, image, caption = _dataset(path, options)
    builder = IndexBuilder()
    for row in range(len(source)):
        reason, record, data, parts, scores = None, None, (), [], {}
        try:
            example = _example(source, row)
            scores = scores_of({k: v.item() if hasattr(v, "item") else v for k, v in example.items()})
            data = _image_parts(example, image)
            parts = [ImagePart(row, len(d), headers.read_header(d).size) for d in data]
            record = _caption(example, caption)
            if image and not data:
                raise BadSample("no_image")
        except BadSample as error:
            reason = error.reason
        image_hash = hash64(b"".join(data)) if hash_images and data else 0
        text = (row, 0, Form.JSON)
        builder.add(
            str(row), images=parts, text=text, record=record, scores=scores, image_hash=image_hash, reason=reason
        )
    return builder.build(meta)


def _example(source: Any, row: int) -> Mapping[str, Any]:
    try:
        return source[row]
    except Exception as error:  # a damaged file, a record that does not parse: many kinds
        raise BadSample("corrupt_record", detail=f"{type(error).__name__}: {error}"[:200]) from None


class Source(IndexedSource):
    """Examples of TFDS datasets. Keys are VERSION/NUMBER."""

    def _record(self, shard: Shard, index: int) -> Record:
        source, _, caption = _dataset(shard.path, shard.options)
        return _caption(_example(source, int(self._table.arrays["text_offset"][index])), caption)

    def _images(self, shard: Shard, index: int, record: Record) -> tuple[bytes, ...]:
        source, image, _ = _dataset(shard.path, shard.options)
        return _image_parts(_example(source, int(self._table.arrays["text_offset"][index])), image)
