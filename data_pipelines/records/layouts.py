"""From a record in any public layout (a dict: a JSON object, a row of a table) to a ``RawSample``.

Tried in this order: a conversation; a caption under its own name; with images, a question and its answer, then other
captions; without images, plain text, then a question and its answer. Names are in ``names``; null counts as absent.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.io.digests import hash64
from data_pipelines.records import extra_formats, names
from data_pipelines.records.pictures import (
    Reference,
    check_ids,
    check_unread,
    given,
    image_fields,
    placed_link,
    references,
)
from data_pipelines.records.raw_sample import IMAGE, Form, RawSample, Video, checked_text, decode_text, parse_json
from data_pipelines.records.turns import Place, loose_marks, neutral, number_images, read_turns
from data_pipelines.records.video.reference import VIDEO, need_videos, place_videos, videos_in

_BY_LETTER = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Reading:
    """What determines how a record is read, apart from the record itself.

    Attributes:
      caption_key: the field that holds the caption; None = the first of ``names.CAPTION_FIELDS``.
      image_fields: the fields that may hold images; the first filled one is used.
      images: how many images come with the record from elsewhere (members of an archive); None: it names its own.
      videos: the same for videos, which follow the images; None: none are read.
      ordered: whether these are in an order that the text cannot change.
      key: of the sample; together with ``seed`` it picks one of several captions.
    """

    caption_key: str | None = None
    image_fields: Sequence[str] = names.IMAGE_FIELDS
    images: int | None = None
    videos: int | None = None
    ordered: bool = True
    key: str = ""
    seed: int = 0


def parse(form: int, data: bytes, reading: Reading = Reading()) -> RawSample:
    """The text in the bytes of a text part.

    Raises BadSample: "no_caption", "caption_not_utf8", "text_not_utf8", "broken_json", or like ``from_record``.
    """
    if form == Form.CAPTION:
        return RawSample(caption=checked_text(decode_text(data), "no_caption"))
    if form == Form.TEXT:
        return RawSample(text=checked_text(decode_text(data, "text"), "empty_text"))
    if form == Form.JSON:
        return from_record(parse_json(data), reading)
    raise BadSample("no_caption", detail="no text part")


def from_record(record: Mapping[str, Any], reading: Reading = Reading()) -> RawSample:
    """The text in a record, and its images as ``image_refs`` unless they come from elsewhere.

    Raises BadSample: "no_caption", "empty_text", "caption_not_utf8", "bad_conversation", "nothing_to_train",
    "image_count_mismatch", "bad_image_field", "unread_image_field", "unread_image_tag", "unread_document",
    "unread_video", "unread_audio", "unexpected_video", "bad_video_field", "video_count_mismatch".
    """
    lower, conversations = _fields_of(tuple(record))
    lowered = record if lower else {name.lower(): record[name] for name in record} | dict(record)
    fields = list(image_fields(lowered, reading.image_fields)) if reading.images is None else []
    videos = videos_in(lowered) if reading.images is None else []
    interleaved = _interleaved(lowered, reading.images)
    conversation = next((lowered[name] for name in conversations if given(lowered[name])), None)
    if interleaved is not None:
        sample = interleaved
    elif conversation is not None or any(lowered.get(name) is not None for name in ("conversations", "messages")):
        turns, places = read_turns(conversation, _system(lowered))
        sample = _talk(turns, places, fields, videos, reading)
    else:
        sample = _other(lowered, fields, videos, reading)
    found = [ref for ref in sample.image_refs if isinstance(ref, Video)]
    need_videos(found, reading.videos is not None)
    with_videos = bool(found or reading.videos)
    with_images = bool(sample.image_refs or reading.images or with_videos)
    check_unread(lowered, with_images, with_videos)
    if not with_images and sample.caption is None:
        turns = conversation if isinstance(conversation, list | tuple) else ()
        check_ids([lowered, *(turn for turn in turns if isinstance(turn, dict))], bool(sample.conversations))
    _check_marks(sample, with_images)
    object.__setattr__(sample, "id", record_id(record))  # not shared yet; copying would cost as much as reading
    return sample


@functools.lru_cache(maxsize=256)
def _fields_of(keys: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
    """(whether all keys are in lower case, the keys that may hold a conversation), once for all records of a file."""
    lowered = {key.lower() for key in keys}
    return all(map(str.islower, keys)), tuple(name for name in names.CONVERSATION_FIELDS if name in lowered)


def _system(record: Mapping[str, Any]) -> str | None:
    return next((v for name in names.SYSTEM_FIELDS if isinstance(v := record.get(name), str) and v.strip()), None)


def _talk(
    turns: Sequence[tuple[str, str]],
    places: Sequence[Place],
    fields: Sequence[tuple[str, Any]],
    videos: Sequence[Video],
    reading: Reading,
) -> RawSample:
    """A conversation with its images and videos in the order of their marks."""
    marks = checked_text(" ".join([text for _, text in turns]), "bad_conversation").count(IMAGE)
    if reading.images is not None:
        return RawSample(conversations=_kept(turns, reading.images, reading.videos or 0, reading.ordered))
    videos = [place for place in places if isinstance(place, Video)] or videos
    places = [place for place in places if not isinstance(place, Video)]
    found = _chosen(fields, marks)
    if places and len(places) == marks:
        found = _placed(places, found)
    turns, order = number_images(loose_marks(turns, len(found)), len(found))
    found = [found[number] for number in order]
    if videos:
        turns, found = place_videos(turns, found, videos)
    return RawSample(conversations=tuple(turns), image_refs=tuple(found))


def _kept(turns: Sequence[tuple[str, str]], images: int, videos: int, ordered: bool) -> tuple[tuple[str, str], ...]:
    """The turns of a record whose images and then videos come from elsewhere."""
    turns, order = number_images(loose_marks(turns, images), images)
    if videos:
        turns, refs = place_videos(turns, [""] * images, [Video("")] * videos)
        order += [images + isinstance(ref, Video) for ref in refs]
    if ordered and order != sorted(order):
        raise BadSample("image_count_mismatch", detail="the text names images in another order than they are stored")
    return tuple(turns)


def _chosen(fields: Sequence[tuple[str, Any]], marks: int) -> list[Reference]:
    """The images of the first filled field; among several, of the first with as many images as there are marks."""
    found = [references(value) for _, value in fields]
    return next((images for images in found if len(images) == marks), found[0]) if found else []


def _placed(places: Sequence[Place], listed: Sequence[Reference]) -> list[Reference]:
    """The images of typed content; those that it only numbers or counts are taken from ``listed``."""
    if all(isinstance(place, str | bytes) for place in places):
        return list(places)
    result, taken = [], 0
    for place in places:
        if isinstance(place, str | bytes):
            result.append(place)
            continue
        number = taken if place is None else place
        if not 0 <= number < len(listed):
            raise BadSample("image_count_mismatch", detail=f"image {number + 1} in the text, {len(listed)} images")
        result.append(listed[number])
        taken += 1
    return result if taken == len(listed) else [*result, *listed[taken:]]


def _other(
    record: Mapping[str, Any], fields: Sequence[tuple[str, Any]], videos: Sequence[Video], reading: Reading
) -> RawSample:
    """A caption, a question with its answer, or plain text."""
    refs = (*(references(fields[0][1]) if fields else ()), *videos)
    images = reading.images + (reading.videos or 0) if reading.images is not None else len(refs)
    caption = record.get(reading.caption_key or "caption")
    if given(caption) or (reading.caption_key and images):
        return RawSample(caption=checked_text(_one(caption, reading), "no_caption"), image_refs=refs)
    question = None
    if images or not given(record.get("text")):
        question = question_and_answer(record)
    if question is not None:
        turns, places = read_turns(question, _system(record))
        return _talk(turns, places, fields, videos, reading)
    if not images and ("caption" not in record or given(record.get("text"))) and "text" in record:
        return RawSample(text=checked_text(record["text"], "empty_text"))
    caption = next((record[name] for name in names.CAPTION_FIELDS if given(record.get(name))), caption)
    if not given(caption) and (asked := next((n for n in names.QUESTION_FIELDS if given(record.get(n))), "")):
        raise BadSample("nothing_to_train", detail=f"{asked!r} without an answer")
    if not given(caption) and "caption" not in record:
        raise BadSample("no_caption", detail=f"no caption, question or conversation in: {', '.join(record)}"[:300])
    return RawSample(caption=checked_text(_one(caption, reading), "no_caption"), image_refs=refs)


def _one(caption: Any, reading: Reading) -> Any:
    """The caption, of several the one picked by the sample's key; COCO-style objects hold one each."""
    if isinstance(caption, list | tuple):
        texts = [text for item in caption if isinstance(text := _one(item, reading), str) and text.strip()]
        return texts[hash64(f"{reading.seed} {reading.key}".encode()) % len(texts)] if texts else None
    if isinstance(caption, dict):
        return next((caption[name] for name in (*names.CAPTION_FIELDS, "raw") if given(caption.get(name))), None)
    return caption


def question_and_answer(record: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a row with a question and its answer (VQA, Alpaca, multiple choice); None for other rows."""
    question = next((record[name] for name in names.QUESTION_FIELDS if given(record.get(name))), None)
    answer = next((record[name] for name in names.ANSWER_FIELDS if given(record.get(name))), None)
    if question is None or answer is None:
        return None
    if isinstance(question, list) and isinstance(answer, list) and all(isinstance(t, dict) for t in question):
        return [*question, *answer]  # TRL's prompt and completion
    if isinstance(question, dict):  # by language
        question = next((text for text in question.values() if isinstance(text, str)), "")
    if not isinstance(question, str):
        raise BadSample("bad_conversation", detail=f"the question is a {type(question).__name__}")
    hint = next((record[name] for name in names.HINT_FIELDS if isinstance(record.get(name), str)), "")
    parts = [hint, question, record["input"] if isinstance(record.get("input"), str) else ""]
    choices = _choices(record)
    text = _answer(answer, list(choices))
    text = next((letter for letter, choice in choices.items() if text not in choices and choice == text), text)
    parts += [f"{letter}. {choice}" for letter, choice in choices.items()] + [_BY_LETTER] * (text in choices)
    earlier = record.get(names.HISTORY_FIELD)
    earlier = list(earlier) if isinstance(earlier, list | tuple) else []
    return [*earlier, {"from": "human", "value": "\n".join(filter(None, parts))}, {"from": "gpt", "value": text}]


def _choices(record: Mapping[str, Any]) -> dict[str, str]:
    """The choices by letter: from columns A, B, C ..., or from a list (perhaps written as text) or dict."""
    columns = {letter: record[letter] for letter in string.ascii_uppercase[:10] if given(record.get(letter))}
    if len(columns) > 1:
        return {letter: str(choice) for letter, choice in columns.items()}
    value = next((record[name] for name in names.CHOICE_FIELDS if given(record.get(name))), None)
    if isinstance(value, str) and value[:1] in "[{":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
    if isinstance(value, dict):
        return {str(letter): str(choice) for letter, choice in value.items() if given(choice)}
    return dict(zip(string.ascii_uppercase, map(str, value))) if isinstance(value, list | tuple) else {}


def _answer(answer: Any, letters: Sequence[str]) -> str:
    """The answer as text: the most frequent of several answers (the first if tied), the letter of a choice."""
    if isinstance(answer, list | tuple):
        texts = [_answer(item, letters) for item in answer if given(item)]
        return Counter(texts).most_common(1)[0][0]
    if isinstance(answer, dict):
        inner = (answer[name] for name in ("answer", "text", "value") if given(answer.get(name)))
        return _answer(next(inner, ""), letters)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    return ("yes" if answer else "no") if isinstance(answer, bool) else str(answer)


def _interleaved(record: Mapping[str, Any], count: int | None) -> RawSample | None:
    """OBELICS documents: lists of texts and of images of equal length, each position filled in one of them.

    ``count``: how many images come from elsewhere; they are placed where there is no text.
    """
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str | None) for text in texts):
        return None
    if images is None and count:
        images = [None if given(text) else IMAGE for text in texts]
        if sum(map(given, images)) != count:
            return None
    if not isinstance(images, list) or len(texts) != len(images) or not any(texts):
        return None
    if not all(bool(given(text)) != bool(given(image)) for text, image in zip(texts, images)):
        return None
    parts = [IMAGE if text is None or not text else neutral(text).replace(IMAGE, " ") for text in texts]
    refs = () if count is not None else tuple(r for image in images if given(image) for r in references(image))
    return RawSample(text=checked_text("\n".join(parts), "empty_text"), image_refs=refs)


def _check_marks(sample: RawSample, with_images: bool) -> None:
    """Raises BadSample if a question has a video or audio mark, or contains or shows an image as text."""
    for speaker, text in sample.conversations:
        if speaker == "human" and not with_images and (tag := placed_link(text)):
            advice = "name it in a field 'image', with <image> in its place"
            raise BadSample("unread_image_tag", detail=f"{tag[:80]}; {advice}")
        if speaker == "human" and "data:image/" in text:
            raise BadSample("unread_image_field", detail="an image is encoded within the text of a turn")
        if speaker == "human" and "<" in text and (found := names.MEDIA_MARK.search(text)):
            medium = found.group(1) or found.group(2)
            if medium == "video":
                extra_formats.refuse_video(f"{VIDEO} in the text, no video in the record")
            raise BadSample("unread_audio", detail=f"<{medium}> in the text")


def record_id(record: Mapping[str, Any]) -> str:
    """The record's own id; "" if it has none."""
    for name in names.ID_FIELDS:
        value = record.get(name)
        if isinstance(value, str | int) and value != "":
            return str(value)[:200]
    return ""
