"""One sample of a source's table, as the formats see it when they read it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from data_pipelines.sources.indices.columns import Columns


class Member(NamedTuple):
    """The place of an image (``frames`` = 0), a video or a text; ``name``: file name."""

    offset: int
    length: int
    name: str = ""
    frames: int = 0


class Entry:
    """One sample of a table: where its parts are in its shard. Everything is looked up on demand."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: Columns, index: int):
        self._columns, self._index = columns, index

    @property
    def row(self) -> int:
        """Its number in the shard, in formats of rows or records."""
        return int(self._columns["text_offset"][self._index])

    @property
    def image_count(self) -> int:
        return int(self._columns["image_count"][self._index])

    @property
    def text_form(self) -> int:
        """A ``raw_sample.Form``."""
        return int(self._columns["text_form"][self._index])

    @property
    def key(self) -> str:
        """The sample's own key."""
        return self._columns.strings("keys")[self._index]

    def text_place(self) -> tuple[int, int]:
        """(offset, length) of the text part in bytes."""
        return self.row, int(self._columns["text_length"][self._index])

    def image_places(self) -> list[tuple[int, int]]:
        """(offset, length) of the images in bytes."""
        offsets, lengths = self._columns["image_offset"], self._columns["image_length"]
        return [(int(offsets[i]), int(lengths[i])) for i in self._images()]

    def frames(self) -> list[int]:
        """The number of each image within a video, from 1; 0 = an image."""
        if "image_frame" not in self._columns:
            return [0] * self.image_count
        return self._columns["image_frame"][self._images()].tolist()

    def members(self) -> list[Member]:
        """The files, or archive members, of its images and videos."""
        parts = list(zip(self.image_places(), self.image_names(), self.frames()))
        starts = [number for number, (*_, frame) in enumerate(parts) if frame < 2]
        frames = [stop - start if parts[start][2] else 0 for start, stop in itertools.pairwise([*starts, len(parts)])]
        return [Member(*parts[start][0], parts[start][1], count) for start, count in zip(starts, frames)]

    def counts(self) -> tuple[int, int]:
        """Numbers of images and of videos."""
        frames = self.frames()
        return frames.count(0), frames.count(1)

    def text_name(self) -> str:
        """File name of the text part; empty if there is none."""
        return self._columns.strings("text_name")[self._index] if "text_name" in self._columns else ""

    def image_names(self) -> list[str]:
        """File names of the images; empty if there are none."""
        if "image_name" not in self._columns:
            return [""] * self.image_count
        names = self._columns.strings("image_name")
        return [names[i] for i in self._images()]

    def _images(self) -> range:
        end = int(self._columns["image_end"][self._index])
        return range(end - self.image_count, end)
