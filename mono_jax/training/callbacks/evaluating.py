"""Measuring during the run, and which step was the best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Say, duration

Evaluate = Callable[[Progress], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Best:
    """The step whose value was the lowest so far; ``metric`` is its name in the records."""

    metric: str
    step: int
    value: float


class Evaluating(Callback):
    """Measures the state after every ``every``-th step and after the last; a value goes into the step's record.

    Stands before the recorder in the loop. With ``metric``, ``best`` is the step at which that was lowest; a value that
    is not finite never is.
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
    ):
        """``record``: is given (step, values, seconds spent). ``best``: of the checkpoint that the run resumes from."""
        self.every, self._evaluate, self._record, self._say = every, evaluate, record, say
        self._metric = metric
        self.best = Best(**best) if best and best["metric"] == metric else None

    def step(self, progress: Progress) -> None:
        with progress.clock.on("wait"):
            jax.block_until_ready(progress.metrics)  # so that steps in flight do not count as time spent here
        before = time.perf_counter()
        values = dict(self._evaluate(progress))
        seconds = time.perf_counter() - before
        self._record(progress.done, values, seconds)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        better = self._metric is not None and values[self._metric] < (self.best.value if self.best else float("inf"))
        self._say(f"step {progress.done}: {shown} (in {duration(seconds)}){', the best so far' if better else ''}")
        if better:
            self.best = Best(self._metric, progress.done, values[self._metric])

    def finish(self, progress: Progress) -> None:
        if progress.error is None and progress.done > progress.start and progress.done % self.every:
            self.step(progress)
