"""Parquet with images in a column: img2dataset's ``parquet`` output, tables of {bytes, path} structs or lists of them.

Random access to a row costs the reading of its row group; parquet is best read in long runs (shuffle "local"), or
rewritten once by ``data_pipelines.build``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io.blobs import open_file
from data_pipelines.io.digests import hash64
from data_pipelines.records import image_header
from data_pipelines.records.raw_sample import Form, RawSample, from_object
from data_pipelines.sources.containers.img2dataset import stats_problems
from data_pipelines.sources.formats.format import FileFormat
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import Draft, ImagePart, IndexBuilder, TextPart, scores_of
from data_pipelines.sources.indices.shard import Options, Shard

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "image_bytes")
_TEXT_COLUMNS = ("caption", "conversations", "messages", "text")
_FAILURES = ("failed_to_download", "failed_to_resize")  # values of img2dataset's column "status"


@dataclasses.dataclass(frozen=True)
class ParquetOptions(Options):
    """Options of parquet files.

    Attributes:
      image_key: column of the images (default: the first of IMAGE_COLUMNS that exists).
      caption_key: column of the captions (default: "caption", "conversations", "messages" or "text").
      hash_images: whether images without a stored hash are hashed, for the filter unique_images.
    """

    image_key: str | None = None
    caption_key: str | None = None
    hash_images: bool = False


class ParquetFormat(FileFormat):
    """Rows of parquet files. Keys are FILE/KEY, or FILE/rowN where there is no column "key"."""

    kind, suffixes, options = "parquet", (".parquet",), ParquetOptions

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """A sample's offset is its row; the rows of a damaged group count as "corrupt_row_group".

        Raises DataError if the file cannot be opened or has no fitting column.
        """
        from data_pipelines.sources.containers.parquet import open_parquet, rows_in_order

        with open_file(shard.path) as file:
            parquet = open_parquet(file, builder.problems)
            if parquet is None:
                return
            names = parquet.schema_arrow.names
            try:
                image, texts = _columns(names, shard.options)
            except DataError as error:
                raise DataError(f"{shard.path}: {error}") from None
            wanted = {"key", "status", "sha256", image, *texts, *(n for n in names if scores_of({n: 0.0}))}
            with_images = 0
            for row, value in enumerate(rows_in_order(parquet, [n for n in names if n in wanted], builder.problems)):
                if value is None:
                    builder.add(Draft(f"row{row}", reason="corrupt_row_group"))
                else:
                    draft, has_images = _draft(row, value, image, shard.options)
                    builder.add(draft)
                    with_images += has_images
        builder.problems.extend(stats_problems(shard.path, with_images))

    def forget(self) -> None:
        from data_pipelines.sources.containers.parquet import forget_readers

        forget_readers()

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """All requested columns in one read."""
        from data_pipelines.sources.containers.parquet import column_names, read_row

        image, texts = _columns(column_names(shard.path), shard.options)
        images = images and entry.image_count > 0
        columns = (*(texts if text else ()), *([image] if images and image not in texts else ()))
        value = read_row(shard.path, entry.row, columns) if columns else {}
        record = _record(value, shard.options.caption_key) if text else RawSample()
        return dataclasses.replace(record, images=image_bytes(value[image]) if images else ())


def _columns(names: Sequence[str], options: ParquetOptions) -> tuple[str | None, list[str]]:
    """(image column, text columns). Raises DataError if there is nothing to read or a named column is missing."""
    for key in (options.image_key, options.caption_key):
        if key and key not in names:
            raise DataError(f"no column {key!r}; columns: {', '.join(names)}")
    image = options.image_key or next((name for name in IMAGE_COLUMNS if name in names), None)
    texts = [options.caption_key] if options.caption_key else [name for name in _TEXT_COLUMNS if name in names]
    if image is None and not set(texts) & {"text", "conversations", "messages"}:
        raise DataError(f"no column of images; set image_key to one of: {', '.join(names)}")
    return image, texts


def _draft(row: int, value: Mapping[str, Any], image: str | None, options: ParquetOptions) -> tuple[Draft, bool]:
    """(what is in a row, whether its image cell holds anything)."""
    key = value.get("key")
    draft = Draft(
        str(key) if key is not None and not isinstance(key, bytes) else f"row{row}",
        text=TextPart(row, 0, Form.JSON),
        scores=scores_of({name: score for name, score in value.items() if score is not None}),
    )
    with draft.judged():
        draft.record = _record(value, options.caption_key)
    data: tuple[bytes, ...] = ()
    with draft.judged():
        data = image_bytes(value.get(image)) if image else ()
        if image and not data and (draft.record is None or draft.record.caption is not None):
            raise BadSample(value.get("status") if value.get("status") in _FAILURES else "no_image")
        draft.images = [ImagePart(row, len(each), image_header.read_header(each).size) for each in data]
        if data and isinstance(value.get("sha256"), str):
            draft.image_hash = hash64(value["sha256"].encode())
        elif data and options.hash_images:
            draft.image_hash = hash64(b"".join(data))
    return draft, bool(data)


def _record(value: Mapping[str, Any], caption_key: str | None) -> RawSample:
    """The text of a row, without its image columns."""
    name = caption_key or "caption"
    for key in (name, "text"):
        if isinstance(value.get(key), bytes):
            raise BadSample("caption_not_utf8", detail=repr(value[key][:40]))
    talks = {key: value[key] for key in ("conversations", "messages") if value.get(key) is not None}
    if talks and not caption_key:
        return from_object(talks)
    if name in value:
        return from_object({"caption": value[name]})
    return from_object({"text": value.get("text")})


def image_bytes(value: Any) -> tuple[bytes, ...]:
    """Encoded images in a cell: bytes, {"bytes": ...}, or a list of these. Raises BadSample."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(image for item in value for image in image_bytes(item))
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BadSample("no_image", detail=f"the cell holds {type(value).__name__} instead of bytes")
    return (value,)
