"""How far the sources of a mixture have been used, so that another mixture can continue without loss or repetition."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far one source has been used.

    Attributes:
      number: identifies the source in the keys of its orders; it is kept when the source's place in the list changes.
      taken: units drawn so far, over all passes.
      waiting: drawn units that are in no used row; they come first.
    """

    number: int
    taken: int = 0
    waiting: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a mixture begins: its first global step, and the state of its sources at that step.

    ``numbers``: how many sources have been given a number so far, including removed ones.
    """

    step: int
    standings: tuple[Standing, ...]
    numbers: int

    @classmethod
    def first(cls, sources: int) -> Begin:
        """The beginning of a run's first mixture."""
        return cls(0, tuple(map(Standing, range(sources))), sources)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Begin:
        standings = (Standing(s["number"], s["taken"], tuple(s["waiting"])) for s in values["standings"])
        return cls(values["step"], tuple(standings), values["numbers"])
