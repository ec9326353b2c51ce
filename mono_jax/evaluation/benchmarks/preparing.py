"""Tasks made ready before a model is loaded: examples are read, and scored as if each were answered right."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from mono_jax.evaluation.benchmarks.catalogue import Task, has_single_answers
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.metrics.choices import question_of
from mono_jax.evaluation.metrics.judged import Memory
from mono_jax.evaluation.metrics.registry import JUDGED, find_metric


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A task's examples, and what is to be known of its scores, a line each."""

    examples: list[Example]
    notes: list[str]


class _Agreeing:
    """Stands for a judge, who is not to be asked yet."""

    name = "none"

    def __call__(self, prompt: str) -> str:
        return "1"


def prepare(task: Task, data: Path, limit: int | None = None, images: Path | None = None) -> Prepared:
    """Arguments as ``Benchmark.read``. Raises DataError if the examples cannot be read, or their answers not scored."""
    examples = task.benchmark.read(data, task.file, limit, images)
    if task.benchmark.hides(examples):
        return Prepared(examples, [])
    file = task.file or task.benchmark.find(data)[0]
    try:
        check(task.benchmark.metric, examples)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return Prepared(examples, [f"{task.name}, {file}: {note}" for note in _notes(task, examples, data)])


def check(metric: str, examples: Sequence[Example]) -> None:
    """Raises DataError if ``metric`` cannot score the examples, or gives their right answers nothing."""
    right = [example.answered(example.truth) for example in examples]
    scores = find_metric(metric, Memory(_Agreeing()))(right)
    if metric not in JUDGED and not any(measure.score > 0 for measure in scores.values()):
        raise DataError(
            f"{metric} gives 0 even to the right answers, as {right[0].answer!r} of example {right[0].id}: "
            "use another metric, or write them as it reads them"
        )


def _notes(task: Task, examples: Sequence[Example], data: Path) -> list[str]:
    benchmark, found = task.benchmark, []
    if benchmark.lacks_annotations(data) and has_single_answers(examples):
        found.append(
            f"no question has more than one right answer; published scores are by all in {benchmark.annotations}, "
            f"which is not below {data}"
        )
    if benchmark.metric == "circular":
        orders = collections.Counter(question_of(example.answered("")) for example in examples)
        options = {question_of(example.answered("")): len(example.options) for example in examples}
        few = [question for question, count in orders.items() if count < options[question]]
        if len(orders) == len(examples):
            found.append(
                "no question stands there in several orders of its options (index q, q + 1000000, ...): accuracy is "
                "given, and no circular score; take the benchmark's file with the orders for that"
            )
        elif few:
            found.append(
                f"{len(few)} of {len(orders)} questions, as {few[0]}, stand there in fewer orders than they have "
                "options: their circular score is easier than the benchmark's"
            )
    return found
