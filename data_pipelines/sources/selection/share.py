"""How much of a shard is offered: several passes, a fraction, or its first, last or some random samples."""

from __future__ import annotations

import dataclasses
import random

import numpy as np


@dataclasses.dataclass(frozen=True)
class Share:
    """How much of a shard is offered.

    Attributes:
      times: the integer part is the number of repetitions; the fractional part selects evenly spread samples.
      part: "first:N", "end:N" or "random:N" of its samples, N a number or a percentage; empty = all.
    """

    times: float = 1.0
    part: str = ""

    def rows(self, count: int) -> np.ndarray:
        """int64 [k]: which of ``count`` samples are offered, in order."""
        chosen = self._part(count)
        count = len(chosen)
        fraction = round((self.times - int(self.times)) * count)
        spread = np.arange(fraction) * count // max(fraction, 1)
        return chosen[np.concatenate([*[np.arange(count)] * int(self.times), spread]).astype(np.int64)]

    def _part(self, count: int) -> np.ndarray:
        if not self.part:
            return np.arange(count, dtype=np.int64)
        where, _, number = self.part.partition(":")
        share = float(number.removesuffix("%"))
        wanted = min(count, -int(-share * count // 100) if number.endswith("%") else int(share))
        if where == "random":
            return np.array(sorted(random.Random(0).sample(range(count), wanted)), np.int64)
        first = 0 if where == "first" else count - wanted
        return np.arange(first, first + wanted, dtype=np.int64)
