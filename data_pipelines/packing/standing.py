"""How far the sources of a mixture have been used, so that another one may go on with nothing lost or repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far one source has been used.

    Attributes:
      number: stands for the source in the keys of its orders; it stays when the source's place in the list changes.
      taken: units drawn so far, pass after pass.
      waiting: those of them that are in no row that was used; they come first.
    """

    number: int
    taken: int = 0
    waiting: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a mixture begins: its first global step, and how its sources stand there.

    ``numbers``: how many sources have had a number so far, those that are gone included.
    """

    step: int
    standings: tuple[Standing, ...]
    numbers: int

    @classmethod
    def first(cls, sources: int) -> Begin:
        """Of a run's first mixture."""
        return cls(0, tuple(map(Standing, range(sources))), sources)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Begin:
        standings = (Standing(s["number"], s["taken"], tuple(s["waiting"])) for s in values["standings"])
        return cls(values["step"], tuple(standings), values["numbers"])
