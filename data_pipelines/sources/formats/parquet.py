"""Parquet: rows in any layout, with their images in columns or as paths of files beside the parquet file.

Random access to a row requires reading its row group. Parquet is best read in long runs (shuffle "local"), or rewritten
once by ``data_pipelines.build``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io.blobs import open_file
from data_pipelines.io.digests import hash64
from data_pipelines.io.storage import Questions
from data_pipelines.records import names
from data_pipelines.records.layouts import Reading, from_record, record_id
from data_pipelines.records.pictures import Reference, image_fields, references
from data_pipelines.records.raw_sample import Form, RawSample
from data_pipelines.records.video.reference import CLIP_FIELDS, with_frames
from data_pipelines.sources.containers.img2dataset import stats_problems
from data_pipelines.sources.formats.format import FileFormat, reading_of
from data_pipelines.sources.formats.referenced import indexed_images, new_images
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import Draft, IndexBuilder, TextPart, origin_of, scores_of
from data_pipelines.sources.indices.shard import Shard, VideoOptions

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "image_bytes")  # tried first, in this order
_IMAGE_FIELDS = tuple(dict.fromkeys([*IMAGE_COLUMNS, *names.IMAGE_FIELDS]))
_TEXT_FIELDS = frozenset(
    [
        *(*names.CONVERSATION_FIELDS, *names.SYSTEM_FIELDS, *names.CAPTION_FIELDS, *names.QUESTION_FIELDS),
        *(*names.ANSWER_FIELDS, *names.HINT_FIELDS, *names.CHOICE_FIELDS, "input", *"abcdefghij"),
        names.HISTORY_FIELD,
    ]
)
_ORIGINS = (
    "url",
    "key",
    "sha256",
    "exif",
    "status",
    "error_message",
)  # img2dataset's columns about where images come from
_FAILURES = ("failed_to_download", "failed_to_resize")  # values of img2dataset's column "status"


@dataclasses.dataclass(frozen=True)
class ParquetOptions(VideoOptions):
    """Options of parquet files.

    Attributes:
      image_root: folder of images given by name (default: the folder of the file).
      image_key: column of the images (default: the first filled one of IMAGE_COLUMNS and ``names.IMAGE_FIELDS``).
      caption_key: column of the captions (default: a conversation, a caption or a question, see ``records.layouts``).
      caption_seed: which of several captions a sample gets (default: 0).
      hash_images: whether images without a stored hash are hashed, for the filter unique_images.
    """

    image_root: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    caption_seed: int | None = None
    hash_images: bool = False


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The relevant columns of a file: images, texts, videos, and others that may hold unread media.

    The others are examined only while indexing.
    """

    images: tuple[str, ...]
    texts: tuple[str, ...]
    videos: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class ParquetFormat(FileFormat):
    """Rows of parquet files. Keys are FILE/KEY, or FILE/rowN where there is no column "key"."""

    kind, options = "parquet", ParquetOptions
    suffixes = (".parquet", ".pq", ".arrow", ".feather", ".mds", ".tfrecord", ".tfrecords")

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """A sample's offset is its row; the rows of a damaged group count as "corrupt_row_group".

        Raises DataError if the file cannot be opened or has no suitable column.
        """
        from data_pipelines.sources.containers.parquet import open_parquet, rows_in_order

        questions = Questions()
        with open_file(shard.path) as file:
            parquet = open_parquet(file, builder.problems)
            if parquet is None:
                return
            schema = parquet.schema_arrow
            layout = _layout_of(shard, schema)
            wanted = {"key", "status", "sha256", "url", *layout.images, *layout.texts, *layout.videos, *layout.others}
            wanted |= {name for name in schema.names if scores_of({name: 0.0}) or _is_id(schema.field(name))}
            columns = [name for name in schema.names if name in wanted]
            with_images = 0
            for row, value in enumerate(rows_in_order(parquet, columns, builder.problems)):
                if value is None:
                    builder.add(Draft(f"row{row}", reason="corrupt_row_group", detail=f"row {row}"))
                else:
                    draft, has_images = _draft(shard, row, value, layout, questions)
                    builder.add(draft)
                    with_images += has_images
        builder.problems.extend(stats_problems(shard.path, with_images))

    def forget(self) -> None:
        from data_pipelines.sources.containers.parquet import forget_readers

        forget_readers()
        _kept_layout.cache_clear()

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """Reads all requested columns at once: images may be in the text column, or ordered by the text."""
        from data_pipelines.sources.containers.parquet import read_row

        layout = _kept_layout(shard)
        images, videos = images and entry.image_count > 0, any(entry.frames())
        of_images = layout.images if images or videos else ()
        parts = [layout.texts if text or images else (), of_images, layout.videos if videos else ()]
        columns = tuple(dict.fromkeys(name for part in parts for name in part))
        value = read_row(shard.path, entry.row, columns) if columns else {}
        reading = _reading(shard, layout, entry.key)
        if not images and videos and text:  # their frames replace the marks in it
            return from_record(_row(value, layout), reading)
        if not images:
            reading = dataclasses.replace(reading, images=entry.image_count, ordered=False)
            return from_record(_row(value, layout), reading) if text else RawSample()
        try:
            record = from_record(_row(value, layout), reading)
        except BadSample:  # a joined caption replaces the text
            if text:
                raise
            record = RawSample(image_refs=tuple(_refs(shard, value, layout)))
        found = indexed_images(shard, record.image_refs, entry)
        return dataclasses.replace(record if text else RawSample(), images=found)


@functools.lru_cache(maxsize=1024)
def _kept_layout(shard: Shard) -> _Layout:
    from data_pipelines.sources.containers.parquet import schema

    return _layout_of(shard, schema(shard.path))


def _is_id(field: pa.Field) -> bool:
    import pyarrow as pa

    return field.name.lower() in names.ID_FIELDS and (pa.types.is_string(field.type) or pa.types.is_integer(field.type))


def _layout_of(shard: Shard, schema: pa.Schema) -> _Layout:
    """Raises a DataError that names the file if there is nothing to read or a specified column is missing."""
    import pyarrow as pa

    options = shard.options
    for key in (options.image_key, options.caption_key):
        if key and key not in schema.names:
            raise DataError(f"{shard.path}: no column {key!r}; columns: {', '.join(schema.names)}")
    lowered = {name.lower(): name for name in reversed(schema.names)}
    if options.image_key:
        images = (options.image_key,)
    else:
        numbered = [name for name in sorted(lowered) if names.NUMBERED_IMAGE.fullmatch(name)]
        spelled = [name for name in lowered if names.IMAGE_FIELD.fullmatch(name)]
        named = [lowered[n] for n in dict.fromkeys([*_IMAGE_FIELDS, *spelled, *numbered]) if n in lowered]
        files = [lowered[name] for name in names.FILE_FIELDS if name in lowered]
        # A column with only nulls, whose type is null, must not stop the search.
        filled = [name for name in named if not pa.types.is_null(schema.field(name).type)]
        images = (*(filled or _held(shard, schema) or named), *files)
    texts = [name for name in schema.names if name.lower() in _TEXT_FIELDS]
    videos = tuple(n for n in schema.names if names.VIDEO_FIELD.fullmatch(n.lower()) or n.lower() in CLIP_FIELDS)
    seen = tuple(name for name in schema.names if names.AUDIO_FIELD.fullmatch(name.lower()))
    used = {*images, *texts, *videos, *(_ORIGINS if images else ())}
    others = tuple(field.name for field in schema if field.name not in used and _may_show_media(field))
    layout = _Layout(images, (options.caption_key,) if options.caption_key else tuple(texts), videos, (*seen, *others))
    seen += videos
    talks = {name.lower() for name in layout.texts} & {"text", *names.CONVERSATION_FIELDS, *names.QUESTION_FIELDS}
    if not layout.images and not talks and not seen:
        raise DataError(f"{shard.path}: no column of images; set image_key to one of: {', '.join(schema.names)}")
    if not layout.texts and not seen:
        raise DataError(f"{shard.path}: no column of texts; set caption_key to one of: {', '.join(schema.names)}")
    return layout


def _may_show_media(field: pa.Field) -> bool:
    """Whether a column may hold paths of media, the media themselves, or ids of the media that a row is about."""
    return bool(names.MEDIA_ID.fullmatch(field.name)) or _may_hold_media(field.type)


def _may_hold_media(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _may_hold_media(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_may_hold_media(child.type) for child in kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _held(shard: Shard, schema: pa.Schema) -> tuple[str, ...]:
    """The only column of bytes, or of structs with bytes. Raises DataError if there are several."""
    import pyarrow as pa

    def holds(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return holds(kind.value_type)
        if pa.types.is_struct(kind):
            return any(child.name == "bytes" and holds(child.type) for child in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    media = (names.VIDEO_FIELD, names.AUDIO_FIELD)
    unnamed = [field.name for field in schema if not any(pattern.fullmatch(field.name.lower()) for pattern in media)]
    found = tuple(name for name in unnamed if holds(schema.field(name).type))
    if len(found) > 1:
        raise DataError(f"{shard.path}: which column holds the images? set image_key to one of: {', '.join(found)}")
    return found


def _image_fields(shard: Shard, layout: _Layout) -> tuple[str, ...]:
    """The names of the columns that hold images, whatever their value looks like, in lower case."""
    if shard.options.image_key:
        return (shard.options.image_key.lower(),)
    own = tuple(name for name in map(str.lower, layout.images) if name not in names.FILE_FIELDS)
    return own if len(own) == 1 else _IMAGE_FIELDS


def _reading(shard: Shard, layout: _Layout, key: str) -> Reading:
    return dataclasses.replace(reading_of(shard.options, key), image_fields=_image_fields(shard, layout))


def _draft(
    shard: Shard, row: int, value: Mapping[str, Any], layout: _Layout, questions: Questions
) -> tuple[Draft, bool]:
    """(the draft of a row, whether its image cells hold anything)."""
    key = value.get("key")
    draft = Draft(
        str(key) if key is not None and not isinstance(key, bytes) else f"row{row}",
        text=TextPart(row, 0, Form.JSON),
        scores=scores_of({name: score for name, score in value.items() if score is not None}),
        origin=origin_of(value),
        id=record_id(value),
    )
    refs: Sequence[Reference] = ()
    with draft.judged():
        draft.record = from_record(_row(value, layout), _reading(shard, layout, draft.key))
    if (draft.reason or "").startswith("unread_"):
        return draft, False
    with draft.judged():
        refs = draft.record.image_refs if draft.record is not None else _refs(shard, value, layout)
        no_text = draft.reason in ("no_caption", "caption_not_utf8")
        if layout.images and not refs and (no_text or (draft.record and draft.record.caption is not None)):
            failed = value.get("status") in _FAILURES
            detail = value.get("error_message") if failed else f"nothing in: {', '.join(layout.images)}"
            raise BadSample(value["status"] if failed else "no_image", detail=str(detail or "")[:300])
        draft.images, data = new_images(shard, refs, questions, row)
        draft.record = draft.record and with_frames(draft.record, [image.frame for image in draft.images])
        if data and isinstance(value.get("sha256"), str):
            draft.image_hash = hash64(value["sha256"].encode())
        elif data and shard.options.hash_images:
            draft.image_hash = hash64(b"".join(data))
    return draft, bool(refs)


def _row(value: Mapping[str, Any], layout: _Layout) -> dict[str, Any]:
    """The row as a record: its text, image and media columns; with a caption_key, no other text."""
    kept = {*layout.images, *layout.texts, *layout.videos, *layout.others}
    return {name: cell for name, cell in value.items() if name in kept}


def _refs(shard: Shard, value: Mapping[str, Any], layout: _Layout) -> list[Reference]:
    """The images in the image columns of a row, whatever its text is. Raises BadSample "bad_image_field"."""
    lowered = {name.lower(): cell for name, cell in value.items() if name in layout.images}
    return next((references(cell) for _, cell in image_fields(lowered, _image_fields(shard, layout))), [])
