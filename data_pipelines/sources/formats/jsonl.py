"""Instruction data: JSONL or a JSON list in LLaVA form, and InternVL meta files that list several of them.

One sample per line (or list element)::

    {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": ...}, ...]}

Without "image" it is a text-only sample; other layouts are read too, see ``records.layouts``. Image paths are relative
to ``image_root`` (default: the folder of the file). If only a few of many images have changed, rebuild the index with
``index --force``: ``JsonlFormat.stamp`` says which changes are detected without it. An InternVL meta file is an object
{NAME: {"root", "annotation", "repeat_time"}}; ``repeat_time`` offers a data set several times or in part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample, StorageError
from data_pipelines.io import blobs, paths
from data_pipelines.io.digests import digest, hash64
from data_pipelines.io.json_lines import lines
from data_pipelines.io.processes import ahead
from data_pipelines.io.storage import Questions, patiently
from data_pipelines.records.layouts import from_record, parse, record_id
from data_pipelines.records.raw_sample import MAX_TEXT_BYTES, Form, RawSample, parse_json
from data_pipelines.records.video.reference import with_frames
from data_pipelines.sources.containers.internvl_meta import meta_entries
from data_pipelines.sources.containers.json_list import is_list, list_elements
from data_pipelines.sources.formats.format import FileFormat, read_ranges, reading_of
from data_pipelines.sources.formats.referenced import indexed_images, new_images, root_of
from data_pipelines.sources.indices.entry import Entry
from data_pipelines.sources.indices.index_builder import Draft, IndexBuilder, TextPart, origin_of, scores_of
from data_pipelines.sources.indices.shard import Shard, VideoOptions
from data_pipelines.sources.indices.shard_index import UNASKED, ShardIndex
from data_pipelines.sources.indices.unchanged import changed
from data_pipelines.sources.selection.share import Share

_IMAGE_FIELD = re.compile(
    rb'"(?:(?:image|img|pic|photo)\w{0,20}|file_?name|url)"\s{0,100}:\s{0,100}("(?:[^"\\]|\\.)*"|\[[^\[\]{}]*\])'
)
_LONGEST_PATH = 4096  # a longer string is the image itself
_FETCHES = 32  # records whose remote images are requested at a time
_PROGRESS_SECONDS = 60.0
_SAMPLED = 1 << 14  # bytes searched for an image's path
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class JsonlOptions(VideoOptions):
    """Options of instruction data.

    Attributes:
      image_root: folder of the images (default: the folder of the file).
      image_key: the field that holds the images (default: the first filled one of ``names.IMAGE_FIELDS``).
      caption_key: the field that holds the caption (default: the first filled one of ``names.CAPTION_FIELDS``).
      caption_seed: which of several captions a sample gets (default: 0).
      hash_images: whether images are hashed, for the filter unique_images.
    """

    image_root: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    caption_seed: int | None = None
    hash_images: bool = False


class JsonlFormat(FileFormat):
    """Lines of JSONL files or elements of JSON lists, whose images are separate files. Keys are FILE:NUMBER."""

    kind, options, key_separator = "jsonl", JsonlOptions, ":"
    suffixes = (".jsonl", ".json", ".ndjson", ".yaml", ".yml", ".csv", ".tsv")

    def find(self, paths: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[Shard, Share]]:
        """Meta files are replaced by the files that they list."""
        for file in itertools.chain.from_iterable(map(self.files_of, paths)):
            entries = meta_entries(file)
            if entries is None:
                yield self.converted(file, options), Share()
            for entry in entries or ():
                root = options.get("image_root") if entry.root is None else entry.root
                shard = self.converted(entry.annotation, {**options, "image_root": root})
                changes = {"max_tiles": entry.max_tiles, "jpeg_augment": entry.jpeg_augment}
                yield dataclasses.replace(shard, **changes), entry.share

    def stamp(self, shard: Shard) -> str:
        """Changes when the file does, or any of about 100 images (8 for remote files) that are sampled from all of it.

        This detects images that are added, removed or replaced together, but not changes to a few of many images.
        """
        marks = _marks(shard, paths.stamp)
        return digest(paths.stamp(shard.path), *marks)

    def contents(self, shard: Shard) -> list[str]:
        """The mark of the file, and that of the images that are examined for ``stamp``."""
        mark = blobs.content_mark(shard.path)
        return [mark, digest(*_marks(shard, _content))] if mark else []

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """Reads each image once. Keys are numbers of lines (or elements), from 1."""
        with blobs.scan_view(shard.path) as view:
            if is_list(view):
                elements = ((number, *place) for number, place in enumerate(list_elements(view, builder.problems), 1))
            else:
                elements = lines(view)
            for draft in _drafts(shard, view, elements):
                builder.add(draft)

    def ask_again(self, shard: Shard, index: ShardIndex, builder: IndexBuilder) -> None:
        """Reads the images of those samples only."""
        questions, unasked = Questions(), set(index.unasked.tolist())
        offsets, lengths = index.columns["text_offset"], index.columns["text_length"]
        builder.problems.extend(index.problems)
        with blobs.scan_view(shard.path) as view:
            for row in range(len(index)):
                if row in unasked:
                    place = int(index.keys[row]), int(offsets[row]), int(lengths[row])
                    builder.add(_draft(shard, questions, *place, _record(view, *place)))
                else:
                    builder.copy(index, row)

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        data = read_ranges(shard, [entry.text_place()])
        try:
            record = parse(entry.text_form, *data, reading_of(shard.options, entry.key))
        except BadSample as error:  # it could be parsed when indexed, or a joined caption replaces it
            if text:
                raise changed(shard.path, f"at byte {entry.row}: {error.reason}") from None
            raise
        if not images:
            return record
        found = indexed_images(shard, record.image_refs, entry)
        return dataclasses.replace(record if text else RawSample(), images=found)


def _drafts(shard: Shard, view: blobs.ScanView, elements: Iterator[tuple[int, int, int]]) -> Iterator[Draft]:
    """The findings about each element; remote images are requested in parallel, with a progress line per minute.

    Raises StorageError.
    """
    questions = Questions()
    calls = ((shard, questions, *element, _record(view, *element)) for element in elements)
    if not paths.is_remote(root_of(shard)) and b"://" not in view.read(0, _SAMPLED):
        yield from (_draft(*call) for call in calls)
        return
    lost: Counter[str] = Counter()
    said = time.monotonic()
    for number, future in enumerate(ahead(_draft, calls, _FETCHES), 1):
        draft = future.result()
        lost.update([draft.reason] if draft.reason else [])
        yield draft
        if time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            _log.warning(
                "%s: %d records and their images read; not usable: %s", shard.path, number, dict(lost) or "none"
            )


def _record(view: blobs.ScanView, number: int, offset: int, length: int) -> bytes | None:
    """The bytes of an element; None if it is too large."""
    return view.read(offset, length) if length <= MAX_TEXT_BYTES else None


def _draft(shard: Shard, questions: Questions, number: int, offset: int, length: int, record: bytes | None) -> Draft:
    draft = Draft(str(number), text=TextPart(offset, 0 if record is None else length, Form.JSON))
    with draft.judged():
        if record is None:
            raise BadSample("text_too_large", detail=f"{length} bytes, at most {MAX_TEXT_BYTES} are read")
        value = parse_json(record)
        draft.scores, draft.origin = scores_of(value), origin_of(value)
        draft.id = record_id(value)
        draft.record = from_record(value, reading_of(shard.options, draft.key))
        draft.images, contents = new_images(shard, draft.record.image_refs, questions)
        if not draft.images and draft.record.caption is not None:
            raise BadSample("no_image", detail=f"a caption, but no image in: {', '.join(value)}"[:300])
        draft.record = with_frames(draft.record, [image.frame for image in draft.images])
        if shard.options.hash_images and contents:
            draft.image_hash = hash64(b"".join(contents))
    return draft


def _image_names(path: str, most: int) -> list[str]:
    """Distinct image paths in the file: all in a small file, otherwise the first after each of ``most`` places."""
    blob = patiently(lambda: blobs.Blob(path))
    if blob.size <= most * _SAMPLED:
        fields = _IMAGE_FIELD.findall(blob.read(0, blob.size))
    else:
        places = random.Random(0).sample(range(blob.size), most)  # equal steps might coincide with a period of the data
        fields = [found.group(1) for at in places if (found := _IMAGE_FIELD.search(blob.read(at, _SAMPLED)))]
    names: dict[str, None] = {}
    for field in fields:
        with contextlib.suppress(ValueError):
            value = json.loads(field)
            images = value if isinstance(value, list) else [value]
            paths_only = (image for image in images if isinstance(image, str) and len(image) < _LONGEST_PATH)
            names.update((image, None) for image in paths_only if not image.startswith("data:"))
    return list(names)


def _marks(shard: Shard, mark: Callable[[str], str]) -> list[str]:
    """Marks of some images; "missing" for those that do not exist."""
    most = 8 if paths.is_remote(shard.path) else 100
    names = _image_names(shard.path, most)
    names, questions, marks = random.Random(0).sample(names, min(most, len(names))), Questions(), []
    for name in names:
        path = paths.join(root_of(shard), name)
        if paths.web_host(path) and not paths.is_remote(shard.path):
            continue  # marks of single images are not requested from the web
        try:
            marks.append(questions.ask(functools.partial(mark, path)))
        except ValueError:  # a NUL character in the path
            marks.append("missing")
        except StorageError as error:
            if error.exhausted:
                raise
            marks.append("missing" if error.missing else UNASKED)
    return marks


def _content(path: str) -> str:
    """``content_mark``; the stamp of a remote file."""
    return blobs.content_mark(path) or paths.stamp(path)
