"""Image-text tars as written by img2dataset and webdataset, indexed once and then read in place.

A sample consists of all members with the same key, see ``containers.members``.
"""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.io import blobs
from data_pipelines.io.blobs import ScanView, scan_view
from data_pipelines.io.digests import hash64
from data_pipelines.records import extra_formats, image_header
from data_pipelines.records.layouts import from_record, parse, record_id
from data_pipelines.records.names import CONVERSATION_FIELDS
from data_pipelines.records.pictures import given, looks_like_an_image
from data_pipelines.records.raw_sample import MAX_TEXT_BYTES, Form, RawSample, Video, parse_json
from data_pipelines.records.video.frames import Sampling, VideoFile, VideoHeader, read_frames, read_header
from data_pipelines.records.video.reference import with_frames
from data_pipelines.sources.containers.img2dataset import stats_problems
from data_pipelines.sources.containers.members import Choice, Group, group_members
from data_pipelines.sources.containers.tar import BLOCK, header, members
from data_pipelines.sources.formats.format import ByteRangeFormat, read_ranges, reading_of
from data_pipelines.sources.indices.entry import Entry, Member
from data_pipelines.sources.indices.index_builder import (
    NO_TEXT,
    Draft,
    ImagePart,
    IndexBuilder,
    TextPart,
    origin_of,
    scores_of,
)
from data_pipelines.sources.indices.shard import Shard, VideoOptions
from data_pipelines.sources.indices.unchanged import changed


@dataclasses.dataclass(frozen=True)
class TarOptions(VideoOptions):
    """Options of tars and of loose files.

    Attributes:
      caption_key: the field of KEY.json that holds the caption (default: the caption is in KEY.txt).
      caption_seed: which of several captions a sample gets (default: 0).
      image_ext: extension of the images, or several: "jpg", "input.png" (default: all images except masks).
      caption_ext: extension of the captions, or several, of which each sample gets one, drawn by its key and
        caption_seed, with {EXTENSION: WEIGHT} according to the weights (default: the first of txt, caption, text).
      hash_images: whether images without a stored hash are hashed, for the filter unique_images.
    """

    caption_key: str | None = None
    caption_seed: int | None = None
    image_ext: tuple[str, ...] | None = None
    caption_ext: tuple[tuple[str, float], ...] | None = None
    hash_images: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice = self.choice
        object.__setattr__(self, "image_ext", choice.images or None)
        object.__setattr__(self, "caption_ext", choice.captions or None)

    @property
    def choice(self) -> Choice:
        """Raises DataError."""
        return Choice.of(self.image_ext, self.caption_ext, self.caption_seed)


class TarFormat(ByteRangeFormat):
    """Tars. Keys are SHARD/KEY."""

    kind, suffixes, options = "tar", (".tar",), TarOptions

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        def video_header(offset: int, size: int) -> VideoHeader:
            return read_header(VideoFile(shard.path, offset, size))

        with scan_view(shard.path) as view:
            found = list(members(view, builder.problems))
            held = {member.offset: member.link for member in found if member.link}
            groups = group_members((m[:3] for m in found), shard.options.choice, builder.problems)
            for group in groups:
                builder.add(draft_of(group, view, shard.options, video_header, lambda offset: held.get(offset, "")))
        builder.problems.extend(stats_problems(shard.path, len(groups)))

    def read(self, shard: Shard, entry: Entry, images: bool, text: bool) -> RawSample:
        """Like other byte ranges, each with the header before it, which must belong to the sample.

        Only those parts of videos are read that their frames need.
        """
        wanted = entry.members() if images else []
        if text and entry.row:
            wanted.append(Member(*entry.text_place(), entry.text_name()))
        found = read_ranges(shard, [(m.offset - BLOCK, BLOCK + (0 if m.frames else m.length)) for m in wanted])
        for data, member in zip(found, wanted):
            _check_member(shard, data[:BLOCK], entry, member.offset, member.name)
        parts = [data[BLOCK:] for data in found]
        sample = RawSample()
        if text:
            reading = reading_of(shard.options, entry.key, *entry.counts())
            sample = parse(entry.text_form, parts.pop() if entry.row else b"", reading)
        stills = [part for part, member in zip(parts, wanted) if not member.frames]
        videos = (VideoFile(shard.path, m.offset, m.length) for m in wanted if m.frames)
        found = (*stills, *frames_in(videos, shard.options.sampling))
        return dataclasses.replace(sample, images=found) if found else sample


def frames_in(videos: Iterable[VideoFile], sampling: Sampling) -> Iterator[bytes]:
    """The frames of all videos of a sample."""
    for file in videos:
        yield from read_frames(file, sampling.times(read_header(file), Video("")))


_unlike: set[str] = set()  # unchanged archives whose headers nevertheless have other names than their members


def _check_member(shard: Shard, block: bytes, entry: Entry, offset: int, member: str) -> None:
    """Raises StorageError unless ``block`` is still the header of a member of the sample, as when it was indexed.

    ``member``: the path of the member that a link points to; empty = one of the sample's own members.
    """
    found = header(block)
    if found is None:
        raise changed(shard.path, f"no member of {entry.key} at byte {offset}")
    name = found[0].removeprefix("./")
    exact = name.isascii() and len(name) < 100  # otherwise the name is in an extended header
    right = posixpath.normpath(name) == member if member else name.startswith(f"{entry.key}.")
    if exact and not right and shard.path not in _unlike:
        if not shard.content or blobs.content_mark(shard.path) != shard.content:
            raise changed(shard.path, f"{name} instead of {entry.key} at byte {offset}")
        _unlike.add(shard.path)


def draft_of(
    group: Group,
    view: ScanView,
    options: TarOptions,
    video_header: Callable[[int, int], VideoHeader],
    file_name: Callable[[int], str],
) -> Draft:
    """The content of a sample's members.

    Args:
      video_header: returns the header of the member at an offset, with a given number of bytes.
      file_name: returns the file name to be stored for the member at an offset, if members are files.
    """
    draft, metadata = Draft(group.key), {}
    with draft.judged():
        if group.problem:
            raise BadSample("ambiguous_key", detail=group.problem)
        found = f"members: {', '.join(group.extensions)}"
        if group.medium == "audio":
            raise BadSample("unread_audio", detail=found)
        if group.medium == "video":
            extra_formats.need("video", found)
        metadata = _metadata(view, group, options.caption_key)
        draft.scores, draft.origin = scores_of(metadata), origin_of(metadata)
        draft.text = _text_part(group, metadata, options.caption_key)
        draft.id = record_id(metadata)
        draft.record = _record(view, group, draft.text, metadata, options)
    if draft.text.length > MAX_TEXT_BYTES:  # perhaps a wrong size, which no column could hold
        draft.text = draft.text._replace(length=0)
    draft.text_name = file_name(draft.text.offset) if draft.text.form else ""
    if (draft.reason or "").startswith("unread_"):
        return draft
    with draft.judged():
        images = [_image_part(view, offset, size, file_name(offset)) for offset, size in group.images]
        for offset, size in group.videos:
            header, name = video_header(offset, size), file_name(offset)
            frames = range(1, len(options.sampling.times(header, Video(""))) + 1)
            images += [ImagePart(offset, size, header.size, name, frame) for frame in frames]
        draft.record = draft.record and with_frames(draft.record, [image.frame for image in images])
        if not images and (draft.record is None or draft.record.caption is not None):
            raise BadSample("no_image", detail=f"members: {', '.join(group.extensions)}")
        if not images and (hidden := _hidden_images(view, group)):
            raise BadSample("unread_image_field", detail=f"members {', '.join(hidden)}: name them in image_ext")
        draft.image_hash = _image_hash(
            view, [image for image in images if image.frame < 2], metadata.get("sha256"), options.hash_images
        )
        draft.images = images
    return draft


def _hidden_images(view: ScanView, group: Group) -> list[str]:
    """Extensions of the members that begin like images; checked if a text would otherwise be trained on by itself."""
    others = {e: place for e, place in group.extensions.items() if place not in (group.json, group.caption)}
    return [e for e, (offset, size) in others.items() if size > 64 and looks_like_an_image(view.read(offset, 64))]


def _metadata(view: ScanView, group: Group, caption_key: str | None) -> dict[str, Any]:
    """The object in the sample's JSON member; a broken one does not matter to a sample that does not need it."""
    try:
        return parse_json(_read_text(view, *group.json)) if group.json else {}
    except BadSample:
        if caption_key or not group.caption:
            raise
        return {}


def _text_part(group: Group, metadata: Mapping[str, Any], caption_key: str | None) -> TextPart:
    """The member that holds the sample's text."""
    conversation = any(given(metadata.get(name)) for name in CONVERSATION_FIELDS)
    if group.json and (caption_key or conversation or not group.caption):
        return TextPart(*group.json, Form.JSON)
    return TextPart(*group.caption, Form.CAPTION) if group.caption else NO_TEXT


def _record(
    view: ScanView, group: Group, text: TextPart, metadata: Mapping[str, Any], options: TarOptions
) -> RawSample:
    if text.form == Form.JSON:
        return from_record(metadata, reading_of(options, group.key, len(group.images), len(group.videos)))
    if not group.caption:
        raise BadSample("no_caption", detail=f"no text among its members: {', '.join(group.extensions)}"[:300])
    return parse(text.form, _read_text(view, text.offset, text.length))


def _check_whole(view: ScanView, offset: int, size: int) -> None:
    if offset + size > view.size:
        raise BadSample("truncated", detail=f"a member of {size} bytes at byte {offset} of {view.size}")


def _read_text(view: ScanView, offset: int, size: int) -> bytes:
    _check_whole(view, offset, size)
    if size > MAX_TEXT_BYTES:
        raise BadSample("text_too_large", detail=f"{size} bytes")
    return view.read(offset, size)


def _image_part(view: ScanView, offset: int, size: int, name: str) -> ImagePart:
    _check_whole(view, offset, size)
    image_header.check_length(size)
    return ImagePart(offset, size, image_header.read_header(view.read(offset, size)).size, name)


def _image_hash(view: ScanView, images: list[ImagePart], sha256: object, hash_images: bool) -> int:
    """The hash from img2dataset's stored sha256 or else, with ``hash_images``, from the images themselves."""
    if images and isinstance(sha256, str) and sha256:
        return hash64(sha256.encode("utf-8", "replace"))
    if images and hash_images:
        return hash64(b"".join(view.read(image.offset, image.length) for image in images))
    return 0
