"""Questions asked during training: answers of the state as it is, on the mesh that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from mono_jax import tree
from mono_jax.errors import unknown_key
from mono_jax.evaluation.in_training.task_config import TaskConfig
from mono_jax.evaluation.metrics.metric import Answered
from mono_jax.evaluation.metrics.registry import METRICS
from mono_jax.evaluation.questions import Question, answer, read_questions, to_prompt
from mono_jax.generation.decode import Generator
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.agreement import together
from mono_jax.parallel.mesh import unshared
from mono_jax.parallel.specs import param_shardings


def scores(metric: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """{name: score} of the answers; the first is the headline. Raises DataError for questions that it cannot score."""
    examples = [
        Answered(question.id, answer, (question.truth,), question.kind)
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {name: measure.score for name, measure in METRICS[metric](examples).items()}


class Asking:
    """Answers to the questions of named tasks, greedily.

    Attributes:
      questions: {name of the task: its questions}.
    """

    def __init__(self, tasks: Mapping[str, TaskConfig], builder: SampleBuilder, dtype: jnp.dtype, mesh: Mesh):
        """Every question is made into a prompt once, so that one that cannot be asked is known now.

        Raises DataError that names the task and the question.
        """
        self._tasks, self._builder, self._dtype, self._mesh = tasks, builder, dtype, unshared(mesh)
        with together():
            self.questions = {name: self._read(name, task) for name, task in tasks.items()}

    def _read(self, name: str, task: TaskConfig) -> list[Question]:
        where = f"config.evaluation.tasks.{name}"
        if task.metric not in METRICS:
            raise unknown_key(f"{where}.metric", task.metric, METRICS)
        try:
            questions = read_questions(task.path, task.image_root)[: task.examples]
        except OSError as error:
            raise DataError(f"{where}.path: {task.path}: {error.strerror}") from None
        if not questions:
            raise DataError(f"{where}.path: {task.path} holds no question")
        for question in questions:
            try:
                to_prompt(self._builder, question)
            except (BadSample, OSError) as error:
                raise DataError(f"{where}: question {question.id!r}, {question.image}: {error}") from None
        try:
            scores(task.metric, questions, [question.truth for question in questions])
        except DataError as error:
            raise DataError(f"{where}.metric: {task.metric}: {error}") from None
        return questions

    def __call__(self, config: Architecture, params: tree.Tree) -> tuple[dict[str, float], dict[str, list[str]]]:
        """({"tasks/NAME": score}, {NAME: answers}); further scores are "tasks/NAME/SCORE".

        Raises GenerationError, and DataError or OSError of an image.
        """
        generator = self._generator(config, params)
        values: dict[str, float] = {}
        answers = {}
        for name, task in self._tasks.items():
            asked = self.questions[name]
            answers[name] = answer(generator, self._builder, asked, task.max_new_tokens, task.batch_size)
            headline, *further = scores(task.metric, asked, answers[name]).items()
            values |= {f"tasks/{name}": headline[1]} | {f"tasks/{name}/{score}": value for score, value in further}
        return values, answers

    def _generator(self, config: Architecture, params: tree.Tree) -> Generator:
        """Of parameters that stay where they are; masters are rounded to the dtype that training computes in."""
        # Rows are not shared by devices here, so the mesh has other axes; each device holds what it held.
        params = jax.device_put(params, param_shardings(config, params, self._mesh))
        return Generator(config, params, self._dtype, mesh=self._mesh)
