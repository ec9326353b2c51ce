"""Building a shard's index: the findings of a format's scan about each sample, collected into columns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.io.digests import digest, hash64
from data_pipelines.records.pictures import image_link
from data_pipelines.records.raw_sample import IMAGE, Form, RawSample
from data_pipelines.records.scripts import script_of
from data_pipelines.sources.indices.columns import Strings
from data_pipelines.sources.indices.shard_index import (
    IMAGE_COLUMNS,
    ORIGINS,
    SAMPLE_COLUMNS,
    SCORES,
    VERSION,
    ShardIndex,
)


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """One encoded image of a sample: its place, its upright size and (kind "files") its file name.

    ``frame``: its number within a video, from 1 (place and name are then those of the video); 0 = an image.
    """

    offset: int
    length: int
    size: tuple[int, int]
    name: str = ""
    frame: int = 0


class TextPart(NamedTuple):
    """The text of a sample: its place, and how it is to be parsed."""

    offset: int = 0
    length: int = 0
    form: Form = Form.NONE


NO_TEXT = TextPart()
_LONGEST_DETAIL = 400  # characters
NOTED = "noted: "  # prefix of entries that are not problems: what is read, but perhaps not as expected


@dataclasses.dataclass
class Draft:
    """What a scan has found out so far about a sample.

    Attributes:
      key: unique within the shard, otherwise the sample counts as a duplicate.
      images: the places of its images.
      text: the place of its text part; ``text_name`` is the text's file name (kind "files").
      record: the parsed text part, if it could be parsed.
      scores: see ``scores_of``.
      origin: its "url" and "sha256" in its metadata, see ``origin_of``.
      image_hash: of the encoded images; 0 = not known.
      reason: why the sample is unusable; None if it is usable. detail: exactly what was found.
      id: the record's own.
    """

    key: str
    images: Sequence[ImagePart] = ()
    text: TextPart = NO_TEXT
    text_name: str = ""
    record: RawSample | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, int] = dataclasses.field(default_factory=dict)
    image_hash: int = 0
    reason: str | None = None
    detail: str = ""
    id: str = ""

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """Ends the block at a ``BadSample``, whose reason becomes the sample's reason."""
        try:
            yield
        except BadSample as error:
            self.reason, self.detail = error.reason, error.detail


class IndexBuilder:
    """Collects samples in order; ``build`` makes the index. For a repeated key only the first sample is usable.

    ``problems``: descriptions of what is wrong with the shard as a whole.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list] = {name: [] for name in SAMPLE_COLUMNS}
        self._image_rows: dict[str, list] = {name: [] for name in IMAGE_COLUMNS}
        self._keys: list[bytes] = []
        self._image_names: list[bytes] = []
        self._text_names: list[bytes] = []
        self._details: list[bytes] = []
        self._ids: list[bytes] = []
        self._seen: set[bytes] = set()
        self._reasons: dict[str, int] = {}
        self.problems: list[str] = []
        self._links: dict[str, str] = {}  # the image that a text shows with a tag, by sample key
        self._copied: ShardIndex | None = None
        self._image_ends = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, draft: Draft) -> None:
        """Adds a sample."""
        key, reason, detail = _encoded(draft.key), draft.reason, draft.detail
        if key in self._seen:
            reason, detail = "duplicate_key", "an earlier sample of this shard has the same key"
        self._seen.add(key)
        self._keys.append(key)
        self._text_names.append(_encoded(draft.text_name))
        self._details.append(_encoded(detail[:_LONGEST_DETAIL]) if reason else b"")
        self._ids.append(_encoded(draft.id) if reason else b"")
        content = draft.record.content if draft.record else ""
        if reason is None and not draft.images and (link := _shown(draft.record, content)):
            self._links[draft.key] = link
        identity = (content if draft.text.form == Form.TEXT else draft.record.identity) if content else ""
        values = {
            "reason": 0 if reason is None else self._reasons.setdefault(reason, len(self._reasons) + 1),
            "image_count": len(draft.images),
            "image_hash": draft.image_hash,
            "text_offset": draft.text.offset,
            "text_length": draft.text.length,
            "text_form": draft.text.form,
            "text_chars": len(content),
            "text_hash": hash64(identity.encode("utf-8", "surrogatepass")) if content else 0,
            "script": script_of(content),
            **{score: draft.scores.get(score, math.nan) for score in SCORES},
            **{name: draft.origin.get(name, 0) for name in ORIGINS},
        }
        for name, value in values.items():
            self._rows[name].append(value)
        for image in draft.images:
            self._image_rows["image_offset"].append(image.offset)
            self._image_rows["image_length"].append(image.length)
            self._image_rows["image_size"].append(image.size)
            self._image_rows["image_frame"].append(image.frame)
            self._image_names.append(_encoded(image.name))

    def copy(self, index: ShardIndex, row: int) -> None:
        """Adds a sample as it is in another index of the same shard; the rows of one index in order."""
        key = _encoded(index.keys[row])
        self._seen.add(key)
        self._keys.append(key)
        self._text_names.append(_encoded(index.text_name[row]) if len(index.text_name) else b"")
        self._details.append(_encoded(index.detail[row]) if len(index.detail) else b"")
        self._ids.append(_encoded(index.record_id[row]) if len(index.record_id) else b"")
        reason = int(index.columns["reason"][row])
        for name in SAMPLE_COLUMNS:
            self._rows[name].append(index.columns[name][row])
        self._rows["reason"][-1] = (
            self._reasons.setdefault(index.reasons[reason - 1], len(self._reasons) + 1) if reason else 0
        )
        if index is not self._copied:
            counts = index.columns["image_count"].astype(np.int64)
            self._copied, self._image_ends = index, np.cumsum(counts)
        end = int(self._image_ends[row])
        for image in range(end - int(index.columns["image_count"][row]), end):
            for name in IMAGE_COLUMNS:
                self._image_rows[name].append(index.columns[name][image])
            self._image_names.append(_encoded(index.image_name[image]) if len(index.image_name) else b"")

    def _strings(self) -> tuple[list[bytes], ...]:
        return self._image_names, self._text_names, self._details, self._ids

    def build(self, meta: Mapping[str, Any]) -> ShardIndex:
        """The index of all samples; ``meta`` holds its kind and the stamp of its shard."""
        for key, link in list(self._links.items())[:1]:
            count = f"{len(self._links)} samples without images show images with a tag, which stays text"
            self.problems.append(f"{NOTED}{count}, such as {key} ({link[:80]})")
        columns = {name: np.asarray(values, SAMPLE_COLUMNS[name]) for name, values in self._rows.items()}
        columns |= {name: np.asarray(values, IMAGE_COLUMNS[name]) for name, values in self._image_rows.items()}
        columns["image_size"] = columns["image_size"].reshape(-1, 2)
        keys = Strings.of(self._keys)
        names = [Strings.of(n if any(n) else []) for n in self._strings()]
        silent = set(ORIGINS) if columns["image_frame"].any() else {*ORIGINS, "image_frame"}
        # Identity of the content: all places and texts, but no path, host or time.
        content = digest(
            keys.data.tobytes(),
            *(columns[name].tobytes() for name in sorted(columns.keys() - silent)),
            json.dumps([list(self._reasons), meta["kind"]]),
        )
        header = {"version": VERSION, "digest": content, **meta}
        return ShardIndex(keys, *names, columns, list(self._reasons), self.problems, header)


def _shown(record: RawSample | None, content: str) -> str:
    """The image tag in the text of a sample without images; "" if there is no such tag."""
    if record is not None and record.text is not None and IMAGE in content:
        return IMAGE
    return image_link(content)


def _encoded(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate from JSON
        return name.encode("utf-8", "replace")


def origin_of(value: Mapping[str, Any]) -> dict[str, int]:
    """Hashes of the "url" and "sha256" in a metadata object; only of those that are strings."""
    texts = {f"{name}_hash": value.get(name) for name in ("url", "sha256")}
    return {
        name: hash64(text.encode("utf-8", "replace")) for name, text in texts.items() if isinstance(text, str) and text
    }


def scores_of(value: Mapping[str, Any]) -> dict[str, float]:
    """The known scores in a metadata object, case-insensitively; only those that are numbers."""
    found = {}
    for name, number in value.items():
        name = score_name(str(name))
        if name in SCORES and isinstance(number, int | float) and not isinstance(number, bool):
            found[name] = float(number)
    return found


def score_name(column: str) -> str:
    """The filters' name for the score in a field: AESTHETIC_SCORE is "aesthetic"."""
    return column.lower().removesuffix("_score")
