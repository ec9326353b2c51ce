"""The uncertainty of a score, and of the difference of two scores: 95 % intervals and exact tests.

The share of independent units that are right or wrong has the exact binomial interval (Clopper and Pearson). All
other measures are resampled by unit, within strata (percentile bootstrap). Models that answered the same units are
compared in pairs: with the same resampling for both, and an exact sign test on the units on which they differ
(McNemar's test where a unit is right or wrong).

Where all units score the same, so do all resamples. The interval then follows from the number of units: at most a share
q of all units scores otherwise, and anything from worst to best, where q is the exact upper limit for none of those
seen.
"""

from __future__ import annotations

import dataclasses
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
      low, high: of the 95 % interval; None if no stratum has a second unit.
      method: "exact" (Clopper-Pearson), "bootstrap", or "units" (by their number, as all score the same).
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

    Resampled. Where too few units differ for that, because the exact sign test allows 0 or all resamples are alike, it
    is widened to the exact interval given the number of units that differ; if none does, it is 0 to 0.

    Args:
      gained, lost: units that only the first, and only the second of the two have.
    """
    if not gained + lost:
        return 0.0, 0.0
    gains = np.repeat([[1.0], [-1.0], [0.0]], [gained, lost, number - gained - lost], axis=0)
    # Three kinds of units are drawn fast, and quantiles of few units jump: more resamples keep chance out of them.
    low, high = _quantiles(_resampled(gains, np.zeros(number, int), 10 * RESAMPLES, seed=0)[:, 0] / number)
    lowest, highest = ((2 * end - 1) * (gained + lost) / number for end in of_share(gained, gained + lost))
    return (min(low, lowest), max(high, highest)) if lowest <= 0 <= highest or low == high else (low, high)


def estimate(measure: Measure, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """The score of ``measure`` and its interval; the same numbers for the same seed."""
    units = len(measure.units)
    if measure.is_proportion:
        method = "exact"
        low, high = (100 * end for end in of_share(int(measure.sums[:, 0].sum()), units))
    else:
        draws = _resampled(measure.sums, measure.strata, resamples, seed)
        method, low, high = _by_resampling(measure.score, measure.value(draws), measure.strata, 0, measure.highest)
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

    total = float(gain(both.sum(axis=0)))
    alone = (first.alone or first.value)(both[:, :k]) - (second.alone or second.value)(both[:, k:])
    better, worse = int((alone > 1e-9).sum()), int((alone < -1e-9).sum())
    if first.is_proportion and second.is_proportion:
        low, high = (100 * end for end in of_gain(better, worse, len(mine)))
    else:
        draws = gain(_resampled(both, first.strata[mine], resamples, seed))
        _, low, high = _by_resampling(total, draws, first.strata[mine], -second.highest, first.highest)
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Difference(total, len(mine), low, high, better, worse, p)


def _by_resampling(
    score: float, draws: np.ndarray, strata: np.ndarray, worst: float, best: float
) -> tuple[str, float | None, float | None]:
    """(method, low, high) of a score between ``worst`` and ``best`` from its resamples.

    A difference of 0 on all units stays 0 to 0: nothing distinguishes the models.
    """
    _, sizes = np.unique(strata, return_counts=True)
    if sizes.max() < 2:
        return "bootstrap", None, None
    low, high = _quantiles(draws)
    all_alike = high - low < 1e-6 and (len(sizes) == 1 or np.isclose(score, [worst, best]).any())
    if not all_alike or (worst < 0 and abs(score) < 1e-6):
        return "bootstrap", low, high
    others = of_share(0, int(sizes.min()) * len(sizes))[1]  # as if every stratum were as small as the smallest
    return "units", score - others * (score - worst), score + others * (best - score)


def _quantiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(sums: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums float64 [resamples, k] of units drawn with replacement within each stratum.

    Units with the same numbers are drawn together, so that a hundred thousand right or wrong answers cost nothing.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for stratum in np.unique(strata):
        rows, counts = np.unique(sums[strata == stratum], axis=0, return_counts=True)
        groups.append((rows, counts))
    at_once = max(1, _CHUNK // sum(len(rows) for rows, _ in groups))
    parts = []
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        parts.append(sum(rng.multinomial(counts.sum(), counts / counts.sum(), size) @ rows for rows, counts in groups))
    return np.concatenate(parts)
