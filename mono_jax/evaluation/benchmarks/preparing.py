"""Checks tasks before a model is loaded: reads the examples, and scores them as if every answer were right."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from mono_jax.evaluation.benchmarks.catalogue import Task, has_single_answers
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics.choices import question_of
from mono_jax.evaluation.metrics.judged import Memory, misread
from mono_jax.evaluation.metrics.registry import JUDGED, find_metric


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A task's examples, and notes on its scores, one line each."""

    examples: list[Example]
    notes: list[str]


class _Agreeing:
    """Replaces the judge, which is not to be asked yet."""

    name = "none"

    def __call__(self, prompt: str) -> str:
        return "1"


def prepare(task: Task, data: Path, limit: int | None = None, images: Path | None = None) -> Prepared:
    """Arguments as for ``Benchmark.read``. Raises DataError if examples cannot be read or their answers not scored."""
    examples = task.benchmark.read(data, task.file, limit, images)
    if task.benchmark.hides(examples):
        return Prepared(examples, [])
    file = task.file or task.benchmark.find(data)[0]
    try:
        notes = check(task.benchmark.metric, examples) + _notes(task, examples, data)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return Prepared(examples, [f"{task.name}, {file}: {note}" for note in notes])


def check(metric: str, examples: Sequence[Example]) -> list[str]:
    """Notes on the scores that right answers get.

    Raises DataError if ``metric`` cannot score the examples, or if all scores of their right answers are 0.
    """
    right = [example.answered(example.truth) for example in examples]
    scores = find_metric(metric, Memory(_Agreeing()))(right)
    wrong = misread(right) if metric == "math_vista" else []  # its judge, which is not asked yet, only extracts
    if len(wrong) == len(right) or (metric not in JUDGED and not any(each.score > 0 for each in scores.values())):
        raise DataError(
            f"{metric} scores even right answers as 0, e.g. {right[0].answer!r} of example {right[0].id}: "
            "use another metric, or write the answers in the form that it reads"
        )
    if wrong:
        first = f"e.g. {wrong[0].truth!r} of example {wrong[0].id}"
        return [f"{len(wrong)} of {len(right)} right answers, {first}, would be scored as wrong: see the metric's rule"]
    if metric in JUDGED:
        return []
    headline, measure = next(iter(scores.items()))
    return [] if measure.score > 0 else [f"{headline} is 0 even for the right answers of these examples"]


def _notes(task: Task, examples: Sequence[Example], data: Path) -> list[str]:
    benchmark, found = task.benchmark, []
    if benchmark.lacks_annotations(data) and has_single_answers(examples):
        found.append(
            f"no question has more than one right answer; published scores use all answers in {benchmark.annotations}, "
            f"which is missing below {data}"
        )
    if benchmark.metric == "circular":
        orders = collections.Counter(question_of(example.answered("")) for example in examples)
        options = {question_of(example.answered("")): len(example.options) for example in examples}
        few = [question for question, count in orders.items() if count < options[question]]
        if len(orders) == len(examples):
            found.append(
                "no question occurs in several orders of its options (index q, q + 1000000, ...): accuracy is given, "
                "but no circular score; use the benchmark's file with the orders for that"
            )
        elif few:
            found.append(
                f"{len(few)} of {len(orders)} questions, e.g. {few[0]}, occur in fewer orders than they have "
                "options: their circular score is easier than the benchmark's"
            )
    return found
