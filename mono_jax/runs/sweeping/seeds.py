"""Means with error bars."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class MeanOfSeeds:
    """The mean of ``n`` values and the half-width of its 95 % interval (Student's t), None for a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanOfSeeds:
        """``values``: at least one, all finite."""
        n, mean = len(values), statistics.fmean(values)
        if n < 2:
            return cls(mean, None, n)
        spread = statistics.stdev(values) / math.sqrt(n)
        return cls(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread, n)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"
