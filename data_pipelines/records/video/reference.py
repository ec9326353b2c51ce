"""Videos in a record: the file of each, the part that is meant, and the marks of their places in the text."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.records import extra_formats, names
from data_pipelines.records.pictures import Reference, given, references
from data_pipelines.records.raw_sample import IMAGE, RawSample, Video

VIDEO = "<video>"  # stands for a video in the text of a record
_MARK = re.compile(f"{VIDEO}|{IMAGE}")
_CLIPS = (("video_start", "video_end"), ("start_time", "end_time"))  # seconds, besides InternVL's "clip": [0.5, 3.0]
CLIP_FIELDS = frozenset(["clip", *(name for pair in _CLIPS for name in pair)])
Turn = tuple[str, str]


def videos_in(record: Mapping[str, Any]) -> list[Video]:
    """The videos that a record names or holds; its keys are in lower case. Raises BadSample "unexpected_video"."""
    fields, files = _fields_of(tuple(record))
    held = (value for name in fields if isinstance(value := record[name], str | bytes | list | tuple | dict))
    named = (value for name in files if isinstance(value := record[name], str) and names.VIDEO_NAME.search(value))
    value = next((value for value in itertools.chain(held, named) if given(value)), None)
    return [] if value is None else videos_of(value, record)


@functools.lru_cache(maxsize=256)
def _fields_of(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of video fields, and of fields for files of any kind; once for all records of a file."""
    fields = tuple(name for name in keys if names.VIDEO_FIELD.fullmatch(name))
    return fields, tuple(name for name in names.FILE_FIELDS if name in keys)


def videos_of(value: Any, record: Mapping[str, Any]) -> list[Video]:
    """The videos in a field, or in a part of typed content. Raises BadSample "unexpected_video", "bad_video_field"."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, list | tuple) for item in value):
        return [video for item in value for video in videos_of(item, {})]
    try:
        found = references(value)
    except BadSample as error:
        raise BadSample("bad_video_field", detail=error.detail) from None
    stills = [each for each in found if isinstance(each, str) and _names_a_still(each)]
    if stills and len(stills) == len(found) and not isinstance(value, str):
        return [Video(tuple(stills))]
    if stills:
        raise BadSample("unexpected_video", detail=f"an image instead of a video: {stills[0][:80]}")
    clip = _clip(record) if len(found) == 1 else None
    return [Video(each, *clip) if clip else Video(each) for each in found if not isinstance(each, Video)]


def _names_a_still(path: str) -> bool:
    return bool(names.IMAGE_NAME.search(path)) and not path.lower().endswith(".gif")


def _clip(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """(first, last) second of the part that is meant, if the record specifies one."""
    pairs = [record.get("clip"), *([record.get(first), record.get(last)] for first, last in _CLIPS)]
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair)) and 0 <= pair[0] < pair[1]:
            return float(pair[0]), float(pair[1])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def need_videos(videos: Sequence[Video], readable: bool) -> None:
    """Raises BadSample unless these videos can be read. ``readable``: whether the format reads videos at all."""
    for video in videos:
        detail = f"a video: {str(video.source)[:80]}"
        if not readable:
            extra_formats.refuse_video(detail)
        if not isinstance(video.source, tuple):
            extra_formats.need("video", detail)


def place_videos(
    turns: Sequence[Turn], images: Sequence[Reference], videos: Sequence[Video]
) -> tuple[list[Turn], list[Reference]]:
    """(turns in which ``<image>`` also stands for videos, images and videos in the order of these marks).

    Items without a mark go before the first question. If a record has only videos, its ``<image>``s refer to them.

    Raises BadSample "video_count_mismatch", "image_count_mismatch".
    """
    marks = _MARK.findall("\n".join(text for _, text in turns))
    if not images and VIDEO not in marks and len(marks) == len(videos):
        marks = [VIDEO] * len(marks)
    for mark, found, reason in ((VIDEO, videos, "video_count_mismatch"), (IMAGE, images, "image_count_mismatch")):
        if marks.count(mark) not in (0, len(found)):
            raise BadSample(reason, detail=f"{marks.count(mark)} {mark} in the text, {len(found)} in the record")
    missing = [mark for mark, found in ((IMAGE, images), (VIDEO, videos)) if mark not in marks for _ in found]
    left = {IMAGE: iter(images), VIDEO: iter(videos)}
    ordered = [next(left[mark]) for mark in [*missing, *marks]]
    turns = [(speaker, text.replace(VIDEO, IMAGE)) for speaker, text in turns]
    first = next((number for number, (speaker, _) in enumerate(turns) if speaker == "human"), None)
    if missing and first is not None:
        turns[first] = "human", f"{IMAGE}\n" * len(missing) + turns[first][1]
    return turns, ordered


def with_frames(sample: RawSample, frames: Sequence[int]) -> RawSample:
    """The sample with each video's mark replaced by a line "Frame1: <image>" for each of its frames.

    Args:
      frames: the number of each of its images within its video, from 1; 0 = an image.
    """
    if not any(frames):
        return sample
    groups = _groups(frames)
    turns = [(speaker, _with_lines(text, groups)) for speaker, text in sample.conversations]
    return dataclasses.replace(sample, conversations=tuple(turns), frames=tuple(frames))


def without_frames(sample: RawSample) -> RawSample:
    """The inverse of ``with_frames``: one mark for each video. Its images and their numbers are kept."""
    if not any(sample.frames):
        return sample
    groups, turns = _groups(sample.frames), []
    lines = next(groups, None)
    for speaker, text in sample.conversations:
        position = 0
        while lines is not None and (at := text.find(lines, position)) >= 0:
            text = text[:at] + IMAGE + text[at + len(lines) :]
            position, lines = at + len(IMAGE), next(groups, None)
        turns.append((speaker, text))
    return dataclasses.replace(sample, conversations=tuple(turns))


def _groups(frames: Sequence[int]) -> Iterator[str]:
    """The text that stands for each image and each video."""
    starts = [at for at, number in enumerate(frames) if number < 2]
    return (frame_lines(frames[start:stop]) for start, stop in itertools.pairwise([*starts, len(frames)]))


def frame_lines(frames: Sequence[int]) -> str:
    """The marks of images and frames, one per line, as InternVL writes them."""
    return "\n".join(f"Frame{number}: {IMAGE}" if number else IMAGE for number in frames)


def _with_lines(text: str, groups: Iterator[str]) -> str:
    first, *others = text.split(IMAGE)
    parts = [first]
    for other in others:
        lines = next(groups, IMAGE)
        ends = "\n" if lines != IMAGE and not other.startswith("\n") else ""
        parts += [lines, ends, other]
    return "".join(parts)
