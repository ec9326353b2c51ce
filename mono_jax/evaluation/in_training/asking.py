"""Benchmarks during training: answers of the current training state, on the mesh that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import DataError
from mono_jax import tree
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.benchmarks.catalogue import Task
from mono_jax.evaluation.benchmarks.other_pictures import with_other_pictures
from mono_jax.evaluation.benchmarks.preparing import Prepared, prepare
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.in_training.task_config import TaskConfig, find_task
from mono_jax.evaluation.metrics.registry import METRICS
from mono_jax.generation.decode import Generator
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.agreement import together
from mono_jax.parallel.mesh import unshared
from mono_jax.parallel.specs import param_shardings


class Asking:
    """Greedy answers to the examples of named tasks: what evaluate.py asks and scores, for a model in training.

    Attributes:
      examples: {name of the task: its examples}.
      notes: remarks on their scores, one line each.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskConfig],
        builder: SampleBuilder,
        dtype: jnp.dtype,
        mesh: Mesh,
        blind: bool = False,
    ):
        """Reads the examples, scores their right answers, and builds each prompt once, so that problems show up now.

        ``blind``: also asks about the pictures of other examples. Raises DataError or ConfigError that name the task
        and the example.
        """
        self._configs, self._builder, self._dtype, self._mesh = tasks, builder, dtype, unshared(mesh)
        self._tasks = {name: find_task(f"config.evaluation.tasks.{name}", task) for name, task in tasks.items()}
        with together():
            prepared = {name: self._prepare(name) for name in tasks}
        self.examples: dict[str, list[Example]] = {name: each.examples for name, each in prepared.items()}
        self.notes = [note for each in prepared.values() for note in each.notes]
        self._blind, notes = with_other_pictures(self.examples if blind else {})
        self.notes += notes

    @property
    def names(self) -> list[str]:
        """Of all values, as far as the examples decide which of its scores a metric gives."""
        names = [f"tasks/{name}/sight" for name in self._blind]
        for name, task in self._tasks.items():
            examples = self.examples[name]
            _, *further = _scores(task, examples, [example.truth for example in examples])
            names += [f"tasks/{name}", *(f"tasks/{name}/{score}" for score in further)]
        return names

    def _prepare(self, name: str) -> Prepared:
        config, task, where = self._configs[name], self._tasks[name], f"config.evaluation.tasks.{name}"
        images = Path(config.image_root) if config.image_root else None
        try:
            prepared = prepare(task, Path(config.data or "."), config.examples, images)
            if task.benchmark.hides(prepared.examples):
                raise DataError(f"the right answers of {task.name} are hidden: evaluate.py writes a file to submit")
            asker = self._asker(None)
            for example in prepared.examples:
                asker.prompt(example)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return prepared

    def _asker(self, generator: Generator | None) -> Asker:
        """With exact pixels, whatever training uses, because evaluate.py and users ask with these."""
        builder = self._builder
        return Asker(generator, builder.tokenizer, builder.chat, builder.tiling, builder.limits)

    def __call__(self, config: Architecture, params: tree.Tree) -> tuple[dict[str, float], dict[str, list[str]]]:
        """({"tasks/NAME": score}, {NAME: answers}); further scores are "tasks/NAME/SCORE".

        "tasks/NAME/sight": by how much the score exceeds that about the pictures of other examples. Raises
        GenerationError, and DataError for an image.
        """
        asker = self._asker(self._generator(config, params))
        values: dict[str, float] = {}
        answers = {}
        for name, task in self._tasks.items():
            answers[name] = self._answers(asker, name, self.examples[name])
            headline, *further = _scores(task, self.examples[name], answers[name]).items()
            values[f"tasks/{name}"] = headline[1]
            values |= {f"tasks/{name}/{score}": value for score, value in further}
            if name in self._blind:
                blind = _scores(task, self._blind[name], self._answers(asker, name, self._blind[name]))
                values[f"tasks/{name}/sight"] = headline[1] - blind[headline[0]]
        return values, answers

    def _answers(self, asker: Asker, name: str, examples: Sequence[Example]) -> list[str]:
        """Answers in the order of the examples; all processes answer all of them."""
        config = self._configs[name]
        longest = config.max_new_tokens or self._tasks[name].benchmark.max_new_tokens
        batches = asker.answers(examples, longest, config.batch_size, meeting=together)
        found = {example.id: text for batch in batches for example, text in batch}
        return [found[example.id] for example in examples]

    def _generator(self, config: Architecture, params: tree.Tree) -> Generator:
        """A generator on parameters that stay in place; master weights are rounded to the compute dtype of training."""
        # Devices do not share rows here, so the mesh has other axes; each device keeps the shards it held.
        params = jax.device_put(params, param_shardings(config, params, self._mesh))
        return Generator(config, params, self._dtype, mesh=self._mesh)


def _scores(task: Task, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """{score: value}, the headline first."""
    answered = [example.answered(text) for example, text in zip(examples, answers, strict=True)]
    return {name: measure.score for name, measure in METRICS[task.benchmark.metric](answered).items()}
