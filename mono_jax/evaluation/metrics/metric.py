"""Definition of a metric: sums over mutually independent units, and scores that are functions of those sums.

    answered examples --metric--> {score name: Measure}        the first is the headline
    Measure: sums float64 [units, k], value: [..., k] -> [...]

An accuracy is right / asked; BLEU, F1 and MME's points are functions of a few more sums. Intervals and differences
between models (``evaluation.intervals``) resample the units and need to know nothing else about a metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError


@dataclasses.dataclass(frozen=True)
class Answered:
    """An example with a model's answer.

    Attributes:
      id: of the example, unique within the task.
      answer: the model's answer.
      truths: right answers: one, one per annotator, or reference captions.
      category: scores are also given by category; "" = none.
      group: examples of the same group (questions about one image) are not independent; "" = independent of all others.
      options: of a multiple-choice question, by letter.
      fields: other values that a metric reads, under the names that the metric documents.
    """

    id: str
    answer: str
    truths: tuple[str, ...]
    category: str = ""
    group: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The unit of resampling that the example belongs to."""
        return self.group or self.id

    @property
    def truth(self) -> str:
        """The first right answer. Raises DataError if there is none."""
        if not self.truths:
            raise DataError(f"example {self.id}: no right answer is given, so its answer cannot be scored")
        return self.truths[0]

    def field(self, name: str) -> Any:
        """Raises DataError if the example lacks it."""
        if name not in self.fields:
            raise DataError(f"example {self.id}: no {name!r}, which this metric needs")
        return self.fields[name]


Value = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score as a function of sums over units.

    Attributes:
      units: their names, by which the measures of two models are paired.
      sums: float64 [units, k].
      value: maps sums [..., k] to the score [...].
      alone: how good a single unit is, from its sums, for the sign test; None = ``value``.
      counts: int [units], number of examples in each unit.
      strata: int [units]; units are resampled within their stratum.
      unit_of_score: "%" (a share times 100), "points" (on the benchmark's own scale).
      highest: the best possible score; the lowest is 0.
      is_share: whether ``sums`` are [right, asked], with examples that are either right or wrong.
    """

    units: tuple[str, ...]
    sums: np.ndarray
    value: Value
    counts: np.ndarray
    strata: np.ndarray
    unit_of_score: str = "%"
    is_share: bool = False
    alone: Value | None = None
    highest: float = 100.0

    @property
    def examples(self) -> int:
        return int(self.counts.sum())

    @property
    def score(self) -> float:
        return float(self.value(self.sums.sum(axis=0)))

    @property
    def is_proportion(self) -> bool:
        """Whether the score is a share of independent examples that are right or wrong."""
        return self.is_share and bool((self.sums[:, 1] == 1).all())


Metric = Callable[[Sequence[Answered]], dict[str, Measure]]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; 0 where nothing was counted."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=np.asarray(below) != 0)


def share(sums: np.ndarray) -> np.ndarray:
    """100 * sums[0] / sums[1]: the achieved percentage of the maximum."""
    return 100 * ratio(sums[..., 0], sums[..., 1])


def measure(
    rows: Iterable[tuple[str, Sequence[float]]],
    value: Value = share,
    *,
    strata: Mapping[str, str] | None = None,
    unit_of_score: str = "%",
    is_share: bool = False,
    alone: Value | None = None,
    highest: float = 100.0,
) -> Measure:
    """Adds up (unit, numbers) by unit. ``strata``: of each unit; None = one for all. Raises DataError without rows."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for unit, numbers in rows:
        sums[unit] = sums.get(unit, 0) + np.asarray(numbers, np.float64)
        counts[unit] = counts.get(unit, 0) + 1
    if not sums:
        raise DataError("there are no examples to score")
    names = [strata[unit] for unit in sums] if strata else [""] * len(sums)
    return Measure(
        units=tuple(sums),
        sums=np.stack(list(sums.values())),
        value=value,
        counts=np.array(list(counts.values())),
        strata=np.unique(names, return_inverse=True)[1],
        unit_of_score=unit_of_score,
        is_share=is_share,
        alone=alone,
        highest=highest,
    )


def mean_of(score: Callable[[Answered], float], name: str = "accuracy", is_share: bool = True) -> Metric:
    """The metric that is the mean, in percent, of a score per example: 0 or 1, or in between if not ``is_share``."""

    def metric(examples: Sequence[Answered]) -> dict[str, Measure]:
        return {name: measure(((example.unit, (score(example), 1)) for example in examples), is_share=is_share)}

    return metric
