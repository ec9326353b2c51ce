"""Evaluates during the run, and keeps track of the best step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mono_jax.errors import unknown_key
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Say, duration

Evaluate = Callable[[Progress], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Best:
    """The step with the best value so far; ``metric`` is its name in the records."""

    metric: str
    step: int
    value: float


class Evaluating(Callback):
    """Evaluates the state after every ``every``-th step and after the last; the values go into the step's record.

    Must come before the recorder in the loop. With ``metric``, ``best`` is the step at which it was lowest or highest;
    a non-finite value is never the best.
    """

    activity = "evaluate"

    def __init__(
        self,
        every: int,
        evaluate: Evaluate,
        record: Callable[[int, Mapping[str, float], float], None],
        say: Say,
        metric: str | None = None,
        best: Mapping[str, Any] | None = None,
        lower_is_better: bool = True,
        before: Callable[[Progress], None] = lambda progress: None,
    ):
        """``record``: called with (step, values, seconds spent). ``best``: from the checkpoint that the run resumes
        from.
        ``before``: called before the first step.
        """
        self.every, self._evaluate, self._record, self._say = every, evaluate, record, say
        self._metric, self._sign, self._before = metric, 1 if lower_is_better else -1, before
        self.best = Best(**best) if best and best["metric"] == metric else None

    def begin(self, progress: Progress) -> None:
        self._before(progress)

    def step(self, progress: Progress) -> None:
        with progress.clock.on("wait"):
            jax.block_until_ready(progress.metrics)  # so that steps in flight do not count as evaluation time
        before = time.perf_counter()
        values = dict(self._evaluate(progress))
        seconds = time.perf_counter() - before
        self._record(progress.done, values, seconds)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        better = self._metric is not None and self._is_better(values)
        self._say(f"step {progress.done}: {shown} (in {duration(seconds)}){', best so far' if better else ''}")
        if better:
            self.best = Best(self._metric, progress.done, values[self._metric])

    def _is_better(self, values: Mapping[str, float]) -> bool:
        if self._metric not in values:
            raise unknown_key("evaluation.keep_best: value", self._metric, values)
        value = values[self._metric]
        return math.isfinite(value) and (self.best is None or self._sign * value < self._sign * self.best.value)

    def finish(self, progress: Progress) -> None:
        if progress.error is None and progress.done > progress.start and progress.done % self.every:
            self.step(progress)
