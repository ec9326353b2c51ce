"""One sample of a source's table, as the formats see it when they read it."""

from __future__ import annotations

from data_pipelines.sources.indices.columns import Columns


class Entry:
    """One sample of a table: where its parts are in its shard. Everything is looked up when it is needed."""

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

    def text_name(self) -> str:
        """File name of the text part; empty where there is none."""
        return self._columns.strings("text_name")[self._index] if "text_name" in self._columns else ""

    def image_names(self) -> list[str]:
        """File names of the images; empty where there are none."""
        if "image_name" not in self._columns:
            return [""] * self.image_count
        names = self._columns.strings("image_name")
        return [names[i] for i in self._images()]

    def _images(self) -> range:
        end = int(self._columns["image_end"][self._index])
        return range(end - self.image_count, end)
