"""TFDS datasets in a random-access format (ArrayRecord), read via ``as_data_source``: TensorFlow is never imported.

The path is the folder of a version of a prepared dataset, the one that contains dataset_info.json. Images stay encoded.
All files of a remote folder are copied to the cache folder when it is first read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io.copies import local_folder
from data_pipelines.io.digests import hash64
from data_pipelines.records import image_header, names
from data_pipelines.records.layouts import from_record
from data_pipelines.records.raw_sample import Form, RawSample
from data_pipelines.records.video.reference import with_frames
from data_pipelines.sources.formats.format import FileFormat, folder_stamp
from data_pipelines.sources.formats.parquet import IMAGE_COLUMNS
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import Draft, ImagePart, IndexBuilder, TextPart, scores_of
from data_pipelines.sources.indices.shard import Shard, VideoOptions

_CAPTION_FIELDS = ("caption", "captions", "text", "description", "title")


@dataclasses.dataclass(frozen=True)
class TfdsOptions(VideoOptions):
    """Options of TFDS datasets.

    Attributes:
      split: the split that is read (default: "train").
      image_key: feature of the images (default: the first of parquet's IMAGE_COLUMNS that exists), or of the frames of
        a video if its name is that of a video.
      caption_key: "feature" or "feature/inner" of the captions (default: the first common one that exists).
      hash_images: whether images are hashed, for the filter unique_images.
    """

    split: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    hash_images: bool = False


class TfdsFormat(FileFormat):
    """Examples of TFDS datasets. Keys are VERSION/NUMBER."""

    kind, options = "tfds", TfdsOptions

    def stamp(self, shard: Shard) -> str:
        return folder_stamp(shard.path)

    def contents(self, shard: Shard) -> list[str]:
        return []

    def forget(self) -> None:
        _open.cache_clear()

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """Reads a split once; a sample's offset and key are its number.

        Raises DataError if the dataset is not prepared, is not in a random-access format, or a feature is missing.
        """
        source, image, caption = _dataset(shard.path, shard.options)
        for row in range(len(source)):
            builder.add(_draft(source, row, image, caption, shard.options))

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        source, image, caption = _dataset(shard.path, shard.options)
        example = _example(source, entry.row)
        record = _caption(example, caption) if text else RawSample()
        return dataclasses.replace(record, images=_image_parts(example, image, shard.options) if images else ())


def _draft(source: Any, row: int, image: str | None, caption: str, options: TfdsOptions) -> Draft:
    draft = Draft(str(row), text=TextPart(row, 0, Form.JSON))
    with draft.judged():
        example = _example(source, row)
        numbers = {name: v.item() if getattr(v, "size", 0) == 1 else v for name, v in example.items()}
        draft.scores = scores_of(numbers)
        data = _image_parts(example, image, options)
        draft.image_hash = hash64(b"".join(data)) if options.hash_images and data else 0
        first = 1 if image and names.VIDEO_FIELD.fullmatch(image.lower()) else 0  # frames are numbered from 1
        draft.images = [
            ImagePart(row, len(each), image_header.read_header(each).size, frame=first and number)
            for number, each in enumerate(data, 1)
        ]
        draft.record = with_frames(_caption(example, caption), [part.frame for part in draft.images])
        if image and not data:
            raise BadSample("no_image", detail=f"nothing in {image!r}")
    return draft


def _example(source: Any, row: int) -> Mapping[str, Any]:
    try:
        return source[row]
    except Exception as error:  # a damaged file or an unparsable record: many exception types
        raise BadSample("corrupt_record", detail=f"{type(error).__name__}: {error}"[:200]) from None


@functools.lru_cache(maxsize=8)
def _open(path: str, split: str, thread: tuple[int, int]) -> tuple[Any, Mapping[str, Any]]:
    """(data source, features) of a split; one per thread and process."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(local_folder(path))
        features = builder.info.features
        images = {name: _as_stored() for name, f in features.items() if _holds_images(tfds, f)}
        return builder.as_data_source(split, decoders=images), features
    except Exception as error:  # tfds raises many exception types
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "tensorflow" in message:
            message += ": video and audio features need it; store frames as Sequence(Image()) under the name 'video'"
        raise DataError(f"{path}: split {split!r} cannot be opened as a TFDS data source ({message})") from None


def _as_stored() -> Any:
    """A decoder that leaves images encoded, also in sequences, which TFDS's own does not support without TensorFlow."""
    import tensorflow_datasets as tfds

    class AsStored(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, batch: Any) -> Any:
            return batch

    return AsStored()


def _holds_images(tfds: Any, feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image) or isinstance(
        getattr(feature, "feature", None), tfds.features.Image
    )


def _dataset(path: str, options: TfdsOptions) -> tuple[Any, str | None, str | None]:
    """(data source, name of the image feature, name of the caption feature)."""
    thread = (os.getpid(), threading.get_ident())
    source, features = _open(path, options.split or "train", thread)
    for option in ("image_key", "caption_key"):
        if (name := getattr(options, option)) and name.split("/")[0] not in features:
            raise DataError(f"{path}: no feature {name!r} for {option}; features: {', '.join(features)}")
    image = options.image_key or _image_feature(path, features)
    caption = options.caption_key or next((name for name in _CAPTION_FIELDS if name in features), None)
    if caption is None:
        raise DataError(f"{path}: which feature is the caption? set caption_key to one of: {', '.join(features)}")
    return source, image, caption


def _image_feature(path: str, features: Mapping[str, Any]) -> str | None:
    """The common one, or the only one. Raises DataError if there are several, or only video and audio."""
    import tensorflow_datasets as tfds

    found = [name for name in features if _holds_images(tfds, features[name])]
    usual = next((name for name in IMAGE_COLUMNS if name in features), None)
    if usual is None and len(found) > 1:
        raise DataError(f"{path}: which feature is the image? set image_key to one of: {', '.join(found)}")
    media = [name for name in features if isinstance(features[name], tfds.features.Video | tfds.features.Audio)]
    if usual is None and not found and media:
        raise DataError(f"{path}: feature {media[0]!r} is video or audio, which is not read")
    return usual or next(iter(found), None)


def _caption(example: Mapping[str, Any], name: str) -> RawSample:
    """The caption at "feature" or "feature/inner"; the first of several captions."""
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
    return from_record({"caption": value})


def _image_parts(example: Mapping[str, Any], name: str | None, options: TfdsOptions) -> tuple[bytes, ...]:
    """The images of an example, or those frames of its video that are used."""
    value = example.get(name) if name else None
    if isinstance(value, bytes):
        return (value,)
    found = [item for item in value if isinstance(item, bytes)] if value is not None else []
    is_video = name is not None and names.VIDEO_FIELD.fullmatch(name.lower())
    return tuple(options.sampling.stills(found) if is_video else found)
