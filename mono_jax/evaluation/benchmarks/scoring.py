"""From answers to scores with intervals for one model, and to differences between models."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mono_jax.evaluation import intervals
from mono_jax.evaluation.benchmarks.catalogue import Task
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics.judged import Memory
from mono_jax.evaluation.metrics.metric import Measure, Metric
from mono_jax.evaluation.metrics.registry import JUDGED, find_metric

_MOST_CATEGORIES = 100  # a column with more values is not a list of categories
_OF_ALL = {"captions", "mme"}  # metrics that score examples jointly
_WITHOUT_CONSTANT = {*JUDGED, "captions", "grounding", "circular"}  # metrics for which a constant answer means nothing


class Scored:
    """One model's answers to a task, scored.

    Attributes:
      measures: {score: Measure}, the headline first.
      constant: the most common right answer, and the measure of always giving it; None where that means nothing.
    """

    def __init__(self, task: Task, examples: Sequence[Example], answers: Mapping[str, str], judge: Memory):
        self._name = task.benchmark.metric
        self._metric = find_metric(self._name, judge)
        self._answered = [example.answered(answers[example.id]) for example in examples]
        self.measures = self._metric(self._answered)
        self.constant = None
        if self._name not in _WITHOUT_CONSTANT:
            self.constant = _constant(self._metric, examples)

    @property
    def headline(self) -> Measure:
        return next(iter(self.measures.values()))

    def to_json(self) -> dict[str, Any]:
        scores = {name: intervals.estimate(measure).to_json() for name, measure in self.measures.items()}
        result: dict[str, Any] = {"scores": scores, "by_category": self._by_category()}
        if self.constant is not None:
            answer, measure = self.constant
            above = intervals.difference(self.headline, measure).to_json()
            result["constant"] = {"answer": answer, "score": measure.score, "difference": above}
        return result

    def _by_category(self) -> dict[str, Any]:
        """The headline score by category, if there are several."""
        of: dict[str, list] = collections.defaultdict(list)
        for each in self._answered:
            of[each.category].append(each)
        if not 1 < len(of) <= _MOST_CATEGORIES:
            return {}
        measured = {name: next(iter(self._metric(some).values())) for name, some in sorted(of.items())}
        return {name: intervals.estimate(measure).to_json() for name, measure in measured.items()}

    def is_right(self) -> dict[str, bool]:
        """{id: whether the example by itself scores above 0}; {} for metrics that do not score single examples."""
        if self._name in _OF_ALL:
            return {}
        found = {}
        for each in self._answered:
            alone = self._metric([each])
            found[each.id] = alone.get("accuracy", alone.get("aAcc", next(iter(alone.values())))).score > 0
        return found


def _constant(metric: Metric, examples: Sequence[Example]) -> tuple[str, Measure]:
    common = collections.Counter(truth for example in examples for truth in example.truths[:1])
    answer = common.most_common(1)[0][0]
    return answer, next(iter(metric([example.answered(answer) for example in examples]).values()))


def differences(scored: Mapping[str, Scored], pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each of ``pairs`` and each score: the first model minus the second one."""
    found = []
    for model, against in pairs:
        for score, measure in scored[model].measures.items():
            if score in scored[against].measures:
                gain = intervals.difference(measure, scored[against].measures[score])
                found.append({"model": model, "against": against, "score": score, **gain.to_json()})
    return found
