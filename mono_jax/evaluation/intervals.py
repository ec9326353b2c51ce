"""The uncertainty of a score, and of the difference of two scores: 95 % intervals and exact tests.

The share of independent units that are right or wrong has the exact binomial interval (Clopper and Pearson). All
other measures are resampled by unit, within strata (percentile bootstrap). Models that answered the same units are
compared in pairs: with the same resampling for both, and an exact sign test on the units on which they differ
(McNemar's test where a unit is right or wrong).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.metric import Measure

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK = 2_000_000  # numbers drawn at a time


@dataclasses.dataclass(frozen=True)
class Score:
    """A score with its interval.

    Attributes:
      n: examples; units: independent groups of them.
      low, high: of the 95 % interval; None if there is only one unit.
      method: "exact" (Clopper-Pearson) or "bootstrap".
    """

    score: float
    n: int
    units: int
    low: float | None
    high: float | None
    method: str
    unit_of_score: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.score:z.2f}"
        return f"{self.score:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The score of one model minus that of another, on the units that both answered.

    Attributes:
      better, worse: units on which the first is above and below the second, each by itself (``Measure.alone``).
      p: of the two-sided exact sign test; 1 if they differ on no unit.
    """

    difference: float
    units: int
    low: float | None
    high: float | None
    better: int
    worse: int
    p: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def of_share(right: int, number: int) -> tuple[float, float]:
    """The exact interval of ``right`` out of ``number`` independent units, as shares."""
    found = stats.binomtest(right, number).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def of_gain(gained: int, lost: int, number: int) -> tuple[float, float]:
    """The interval of (gained - lost) / number: the difference of two shares over the same ``number`` units.

    Args:
      gained, lost: units that only the first, and only the second of the two have. Resampled, as in ``difference``.
    """
    counts = np.array([gained, lost, number - gained - lost])
    draws = np.random.default_rng(0).multinomial(number, counts / number, RESAMPLES)
    return _interval((draws[:, 0] - draws[:, 1]) / number)


def estimate(measure: Measure, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """The score of ``measure`` and its interval; the same numbers for the same seed."""
    units = len(measure.units)
    method = "exact" if measure.is_proportion else "bootstrap"
    low: float | None = None
    high: float | None = None
    if measure.is_proportion:
        low, high = (100 * end for end in of_share(int(measure.sums[:, 0].sum()), units))
    elif units > 1:
        low, high = _interval(
            np.concatenate([*map(measure.value, _resampled(measure.sums, measure.strata, resamples, seed))])
        )
    return Score(measure.score, measure.examples, units, low, high, method, measure.unit_of_score)


def difference(first: Measure, second: Measure, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """By how much ``first`` exceeds ``second``. Raises DataError if they have no unit in common."""
    place = {unit: i for i, unit in enumerate(second.units)}
    mine = np.array([i for i, unit in enumerate(first.units) if unit in place], int)
    theirs = np.array([place[first.units[i]] for i in mine], int)
    if not len(mine):
        raise DataError("the models have no example in common: evaluate both on the same data")
    both = np.concatenate([first.sums[mine], second.sums[theirs]], axis=1)
    k = first.sums.shape[1]

    def gain(sums: np.ndarray) -> np.ndarray:
        return first.value(sums[..., :k]) - second.value(sums[..., k:])

    low = high = None
    if len(mine) > 1:
        draws = _resampled(both, first.strata[mine], resamples, seed)
        low, high = _interval(np.concatenate([*map(gain, draws)]))
    alone = (first.alone or first.value)(both[:, :k]) - (second.alone or second.value)(both[:, k:])
    better, worse = int((alone > 1e-9).sum()), int((alone < -1e-9).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Difference(float(gain(both.sum(axis=0))), len(mine), low, high, better, worse, p)


def _interval(scores: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(sums: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sums float64 [some, k] of units drawn with replacement within each stratum, ``resamples`` of them in all.

    Units with the same numbers are drawn together, so that a hundred thousand right or wrong answers cost nothing.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for stratum in np.unique(strata):
        rows, counts = np.unique(sums[strata == stratum], axis=0, return_counts=True)
        groups.append((rows, counts))
    at_once = max(1, _CHUNK // sum(len(rows) for rows, _ in groups))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        yield sum(rng.multinomial(counts.sum(), counts / counts.sum(), size) @ rows for rows, counts in groups)
