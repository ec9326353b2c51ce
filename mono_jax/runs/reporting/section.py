"""The parts of a report, independent of its output format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

Rows = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Card:
    """A picture with what was asked about it; ``answers``: [(label, answer, whether it is right)]."""

    image: Path
    asked: str
    truth: str
    answers: Sequence[tuple[str, str, bool]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what follows it.

    Attributes:
      lines: items of a list; a single one is a paragraph.
      table: the first row holds the headings.
      picture: PNG; ``alt`` says what it shows.
      folded: shown only on demand.
    """

    title: str
    lines: Sequence[str] = ()
    table: Rows = ()
    picture: bytes | None = None
    alt: str = ""
    cards: Sequence[Card] = ()
    folded: bool = False
