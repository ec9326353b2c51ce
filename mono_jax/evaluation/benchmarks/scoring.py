"""From answers to scores with intervals for one model, and to differences between models."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mono_jax.evaluation import intervals
from mono_jax.evaluation.benchmarks.catalogue import Task
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics.judged import Memory
from mono_jax.evaluation.metrics.metric import Answered, Measure
from mono_jax.evaluation.metrics.registry import CATEGORIES, JUDGED, find_metric

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
        self.constant = self._constant(self._answered)

    @property
    def headline(self) -> Measure:
        return next(iter(self.measures.values()))

    def to_json(self) -> dict[str, Any]:
        scores = {name: intervals.estimate(measure).to_json() for name, measure in self.measures.items()}
        result: dict[str, Any] = {"scores": scores, "by_category": {}}
        for name, measure in self.by_category.items():
            of = result["by_category"][name] = intervals.estimate(measure).to_json()
            if (constant := self._constant(self._categories[name])) is not None:
                of["constant"] = {"answer": constant[0], "score": constant[1].score}
        if self.constant is not None:
            answer, measure = self.constant
            above = intervals.difference(self.headline, measure).to_json()
            result["constant"] = {"answer": answer, "score": measure.score, "difference": above}
        return result

    @functools.cached_property
    def by_category(self) -> dict[str, Measure]:
        """The headline score by category, if there are several."""
        return {name: next(iter(self._metric(some).values())) for name, some in self._categories.items()}

    @functools.cached_property
    def _categories(self) -> dict[str, list[Answered]]:
        of: dict[str, list[Answered]] = collections.defaultdict(list)
        named = CATEGORIES.get(self._name, lambda each: (each.category,))
        for each in self._answered:
            for name in named(each):
                of[name].append(dataclasses.replace(each, category=name))
        return dict(sorted(of.items())) if 1 < len(of) <= _MOST_CATEGORIES else {}

    def _constant(self, answered: Sequence[Answered]) -> tuple[str, Measure] | None:
        """The most common right answer to the same questions, and the measure of always giving it."""
        if self._name in _WITHOUT_CONSTANT:
            return None
        answer = collections.Counter(truth for each in answered for truth in each.truths[:1]).most_common(1)[0][0]
        always = [dataclasses.replace(each, answer=answer) for each in answered]
        return answer, next(iter(self._metric(always).values()))

    def is_right(self) -> dict[str, bool]:
        """{id: whether the example by itself scores above 0}; {} for metrics that do not score single examples."""
        if self._name in _OF_ALL:
            return {}
        found = {}
        for each in self._answered:
            alone = self._metric([each])
            found[each.id] = alone.get("accuracy", alone.get("aAcc", next(iter(alone.values())))).score > 0
        return found


def differences(scored: Mapping[str, Scored], pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each of ``pairs`` and each score, the first model minus the second one; the headline by category, too."""
    found = []
    for model, against in pairs:
        first, second = scored[model], scored[against]
        for score, measure in first.measures.items():
            if score in second.measures:
                gain = intervals.difference(measure, second.measures[score])
                found.append({"model": model, "against": against, "score": score, **gain.to_json()})
                if measure is first.headline and first.by_category:
                    found[-1]["by_category"] = {
                        name: intervals.difference(of, second.by_category[name]).to_json()
                        for name, of in first.by_category.items()
                    }
    return found
