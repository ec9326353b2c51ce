"""An example of a benchmark: a question about pictures, and its right answers."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io.digests import digest
from mono_jax.evaluation.metrics.metric import Answered


class Spool:
    """Encoded pictures from inside a table, kept on disk instead of in memory until the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the pictures exist)
        self._size = 0

    def add(self, data: bytes) -> tuple[int, int]:
        """Offset and length."""
        os.pwrite(self._file.fileno(), data, self._size)
        self._size += len(data)
        return self._size - len(data), len(data)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture: a file, or a place in a ``Spool``.

    Attributes:
      name: for messages.
      mark: changes with the content, as far as that is cheap to detect.
      same: pictures with the same value are identical, whatever rows they came with.
    """

    name: str
    mark: str
    same: str
    path: Path | None = None
    spool: Spool | None = None
    place: tuple[int, int] = (0, 0)

    def read(self) -> bytes:
        """Raises DataError that names the file."""
        if self.spool is not None:
            return self.spool.read(*self.place)
        try:
            return Path(self.path or self.name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      id: unique within the task.
      turns: (speaker, text) up to the question; ``<image>`` marks where a picture goes, otherwise pictures come first.
      pictures: in the order in which the text refers to them.
      truths, category, group, options, fields: as in ``Answered``.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...] = ()
    truths: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The text of the question."""
        return self.turns[-1][1]

    @property
    def truth(self) -> str:
        """The first right answer, in the wording of one annotator. Raises DataError if there is none."""
        return self.answered("").truth

    @property
    def digest(self) -> str:
        """Digest of the question; pictures enter by name and mark."""
        words = (part for turn in self.turns for part in turn)
        return digest(*words, *(part for picture in self.pictures for part in (picture.name, picture.mark)))

    def answered(self, answer: str) -> Answered:
        return Answered(self.id, answer, self.truths, self.category, self.group, self.options, self.fields)
