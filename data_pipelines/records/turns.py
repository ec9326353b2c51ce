"""Conversations of public data sets as turns of (speaker, text): spellings, typed content, marks of images."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.records import names
from data_pipelines.records.pictures import Reference, check_unread, given, image_fields, references
from data_pipelines.records.raw_sample import IMAGE
from data_pipelines.records.video.reference import VIDEO, Turn, videos_in, videos_of

# An image or video in typed content: itself, or an image's number among those of the sample, or the next image.
Place = Reference | int | None

_IMAGE_TYPES = frozenset(["image", "image_url", "input_image", "img", "picture", "image_path"])


def read_turns(value: Any, system: str | None = None) -> tuple[tuple[Turn, ...], list[Place]]:
    """(turns, the images that typed content places in them). ``value``: a list of turns or of (question, answer) pairs.

    Raises BadSample "bad_conversation", "nothing_to_train", "unread_video", "unread_audio", "bad_image_field".
    """
    value = _listed(value)
    if not isinstance(value, list | tuple) or not value:
        raise BadSample("bad_conversation", detail="conversations must be a list with at least one turn")
    places: list[Place] = []
    turns = [(speaker, _tagged(speaker, text, places)) for item in value for speaker, text in _turns_of(item, places)]
    if system and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", system))
    if not any(text.strip() for _, text in turns):
        raise BadSample("bad_conversation", detail="all turns are empty")
    turns = [(speaker, neutral(text)) for speaker, text in turns]
    check_answered(turns)
    return tuple(turns), places


def _listed(value: Any) -> Any:
    """The list of turns in a field, which may also be written as text, by columns, or as the only item of a list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            if (value := _literal(value)) is None:
                reason = f"neither a list of turns nor JSON of one ({error})"
                raise BadSample("bad_conversation", detail=reason) from None
    if isinstance(value, dict):
        columns = bool(value) and all(isinstance(column, list | tuple) for column in value.values())
        return [dict(zip(value, row)) for row in zip(*value.values())] if columns else [value]
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        return value[0] if value[0] and all(isinstance(turn, dict) for turn in value[0]) else value
    return value


def _literal(text: str) -> Any:
    """The value that Python or NumPy wrote as text; None if it is not a list or dict."""
    try:
        found = ast.literal_eval(re.sub(r"\}\s+\{", "}, {", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None


@functools.lru_cache(maxsize=4096)
def speaker_of(role: str) -> str | None:
    """ "human", "gpt" or "system" for any public spelling of a speaker; None for others."""
    name = role.strip("<>|:[]# \n").lower()
    if name not in names.ROLES:
        name = name.rstrip("0123456789").rstrip(" _-")  # user1, Bot 2
    return names.ROLES.get(name) or ("gpt" if names.MODEL.match(name) else None)


def _turns_of(item: Any, places: list[Place]) -> list[Turn]:
    """One turn, or the two of a question with its answer."""
    if type(item) is dict and len(item) == 2:  # the most common case, without trying all spellings
        role, text = item.get("from"), item.get("value")
        if type(role) is str and type(text) is str and role in names.ROLES:
            return [(names.ROLES[role], text)]
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return [("human", item[0]), ("gpt", item[1])]
    if not isinstance(item, dict):
        raise BadSample("bad_conversation", detail=f"turn is a {type(item).__name__}")
    if not all(map(str.islower, item)):
        item = {name.lower(): value for name, value in item.items()} | item
    role = next((item[name] for name in names.ROLE_FIELDS if given(item.get(name))), None)
    if role is None and (pair := _pair(item)):
        return [(speaker, _content(text, places)) for speaker, text in pair]
    if role is None:
        raise BadSample("bad_conversation", detail=f"a turn without a speaker; its keys: {', '.join(item)}"[:300])
    speaker = speaker_of(role) if isinstance(role, str) else None
    if speaker is None:
        raise BadSample("bad_conversation", detail=f"unknown speaker {str(role)[:40]!r}")
    filled = (item[name] for name in names.TEXT_FIELDS if item.get(name) is not None)
    text = next(filled, None)
    if text is None:
        raise BadSample("bad_conversation", detail=f"a turn of {role!r} without text; its keys: {', '.join(item)}")
    before = len(places)
    text = _content(text, places)
    return [(speaker, text if len(places) > before else _with_own_images(item, text, places))]


def _with_own_images(item: Mapping[str, Any], text: str, places: list[Place]) -> str:
    """The text of a turn with images in its own field, which go before the text unless marks place them."""
    others = {name.lower(): value for name, value in item.items()}
    for name in (*names.ROLE_FIELDS, *names.TEXT_FIELDS):
        others.pop(name, None)
    own = [found for _, value in itertools.islice(image_fields(others), 1) for found in references(value)]
    videos = videos_in(others)
    check_unread(others, bool(own), bool(videos))
    marks = text.count(IMAGE)
    if own and marks not in (0, len(own)):
        raise BadSample("image_count_mismatch", detail=f"{marks} {IMAGE} in a turn with {len(own)} images")
    places += [*own, *videos]
    text = text if VIDEO in text else f"{VIDEO}\n" * len(videos) + text
    return text if marks else f"{IMAGE}\n" * len(own) + text


def _tagged(speaker: str, text: str, places: list[Place]) -> str:
    """``text`` with a mark for each ``<img>PATH</img>`` of a question, as Qwen-VL's sets name their images."""
    if speaker != "human" or not names.IMAGE_TAG.search(text):
        return text

    def mark(found: re.Match[str]) -> str:
        places.append(found.group(1))
        return IMAGE

    return names.IMAGE_TAG.sub(mark, text)


def _pair(item: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The question and the answer in one object, such as {"user": ..., "assistant": ...}; [] if they are missing."""
    question = next((item[name] for name in (*names.QUESTION_FIELDS, "q") if isinstance(item.get(name), str)), None)
    answer = next((item[name] for name in (*names.ANSWER_FIELDS, "a") if isinstance(item.get(name), str)), None)
    return [] if question is None or answer is None else [("human", question), ("gpt", answer)]


def _content(content: Any, places: list[Place]) -> str:
    """The text of a turn; images and videos of typed content are added to ``places`` and replaced by marks."""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list | tuple):
        parts = [_string(content, "turn text")]
    texts: list[tuple[str, bool]] = []  # with whether it is a mark
    for part in parts:
        if isinstance(part, dict):
            texts.append(_part(part, places))
        elif part is not None:
            texts.append((_string(part, "a part of a turn"), False))
    if any(marks := [mark for _, mark in texts]):  # then marks typed in the text do not count
        typed = (
            text if mark else text.replace(IMAGE, " ").replace(VIDEO, " ") for (text, _), mark in zip(texts, marks)
        )
        texts = list(zip(typed, marks))
    return "\n".join(text for text, _ in texts)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadSample("bad_conversation", detail=f"{what} is a {type(value).__name__}")
    return value


def _part(part: Mapping[str, Any], places: list[Place]) -> tuple[str, bool]:
    """(text, whether it is the mark of an image or a video) of a part of typed content."""
    kind = str(
        part.get("type") or next((name for name in ("text", *_IMAGE_TYPES) if given(part.get(name))), "")
    ).lower()
    if "audio" in kind:
        raise BadSample("unread_audio", detail=f"a part of type {kind!r}")
    if "video" in kind:
        payload = {name: value for name, value in part.items() if name not in ("type", "text")}
        places += videos_in(payload) or (videos_of(payload, payload) if given(payload) else [])
        return VIDEO, True
    if kind in _IMAGE_TYPES:
        payload = {name: value for name, value in part.items() if name not in ("type", "text", "index", "detail")}
        number = part.get("index")
        places.append(references(payload)[0] if given(payload) else number if isinstance(number, int) else None)
        return IMAGE, True
    text = next((part[name] for name in ("text", "content", "value") if isinstance(part.get(name), str)), None)
    return _string(text, f"the text of a part of type {kind!r}"), False


def neutral(text: str) -> str:
    """``text`` without control tokens, and with every image mark except numbered ones as ``<image>``."""
    if "<" in text:
        text = names.OTHER_MEDIA.sub(lambda found: VIDEO if found.group(1) else "<audio>", text)
        text = names.CONTROL.sub(" ", names.OTHER_MARKS.sub(IMAGE, text))
    return text


def loose_marks(turns: Sequence[Turn], count: int) -> Sequence[Turn]:
    """The turns with ``<image>`` for words such as "[IMG]", if these are ``count`` and there are no other marks."""
    if not count or sum(text.count(IMAGE) + len(names.NUMBERED_MARK.findall(text)) for _, text in turns):
        return turns
    found = sum(len(names.LOOSE_MARK.findall(text)) for speaker, text in turns if speaker == "human")
    if found != count:
        return turns
    return [(who, names.LOOSE_MARK.sub(IMAGE, text) if who == "human" else text) for who, text in turns]


def check_answered(turns: Sequence[Turn]) -> None:
    """Raises BadSample if no answer to a question can be trained on."""
    first = next((number for number, (speaker, _) in enumerate(turns) if speaker == "human"), len(turns))
    answered = any(speaker == "gpt" and text.strip() for speaker, text in turns[first:])
    if answered and any(speaker == "gpt" and IMAGE in text for speaker, text in turns[:first]):
        raise BadSample(
            "bad_conversation", detail="the image is in the assistant's first turn: are the speakers swapped?"
        )
    if not answered:
        if first == len(turns):
            raise BadSample("bad_conversation", detail="no question")
        raise BadSample("nothing_to_train", detail="no question has an answer: are the speakers swapped?")


def number_images(turns: Sequence[Turn], count: int) -> tuple[tuple[Turn, ...], list[int]]:
    """(turns in which ``<image>`` replaces marks such as ``<image 2>``, the images' numbers in order of the marks).

    A repeated mark becomes the words "image 2". Raises BadSample "image_count_mismatch" if the marks do not name each
    of the ``count`` images.
    """
    found = [int(number) for _, text in turns if "<" in text for number in names.NUMBERED_MARK.findall(text)]
    if not found:
        return tuple(turns), list(range(count))
    placed = sum(text.count(IMAGE) for _, text in turns)
    if placed and placed == count:  # in the second case the numbers only mention images
        return tuple(turns), list(range(count))
    base = 0 if 0 in found else 1
    order = list(dict.fromkeys(number - base for number in found))
    if sorted(order) != list(range(count)) or placed:
        marks = ", ".join(f"<image {number}>" for number in dict.fromkeys(found))
        raise BadSample("image_count_mismatch", detail=f"{marks} in the text, {count} images")
    seen: set[int] = set()

    def mark(match: re.Match[str]) -> str:
        number = int(match.group(1))
        first = number not in seen
        seen.add(number)
        return IMAGE if first else f"image {number}"

    return tuple((speaker, names.NUMBERED_MARK.sub(mark, text)) for speaker, text in turns), order
