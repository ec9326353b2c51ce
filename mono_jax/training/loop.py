"""The training loop: batches in, steps, and callbacks for everything else.

The loop never waits for the device: callbacks get the arrays of a step's metrics, which may not be computed yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.errors import CheckpointError, MonoJaxError
from mono_jax.parallel.rows import LocalRows
from mono_jax.parallel.totals import Totals
from mono_jax.training.clock import Clock
from mono_jax.training.state import TrainState
from mono_jax.training.step import Metrics, Step


class Batches(Protocol):
    """What the loop needs of the data (``data_pipelines.loading.packed_data.PackedData``)."""

    batch_size: int

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]: ...


class Stopped(MonoJaxError):
    """A run that ends before its last step, with its state saved unless the message says otherwise."""


class DataEnded(Stopped):
    """The data has fewer steps than the stage."""


@dataclasses.dataclass
class Progress:
    """Where a run is; callbacks read it, only the loop writes it.

    Attributes:
      state: after ``done`` steps.
      frozen: parameters that never change.
      start: steps done when the loop began.
      done: steps done so far.
      steps: where the stage ends.
      metrics: of the last step, still on the device.
      batch: the last step's rows of this process.
      counted: bool [rows], those of them that this process counts; the others are counted by another one.
      totals: what the callbacks' ``facts`` add up to over all processes.
      data_wait: seconds that batch took to come.
      error: what ends the run before ``steps``, if anything does.
      clock: of what the time is spent on.
    """

    state: TrainState
    frozen: tree.Tree
    start: int
    done: int
    steps: int
    metrics: Metrics = dataclasses.field(default_factory=dict)
    batch: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counted: np.ndarray | None = None
    totals: Totals = dataclasses.field(default_factory=Totals)
    data_wait: float = 0.0
    error: Exception | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)


class Callback:
    """Something that happens beside training: after every ``every``-th step, and when the loop ends.

    Callbacks run in the order given. ``step`` may raise ``Stopped`` to end the run; whatever ends it, ``finish``
    still runs for all of them. ``activity``: what their time counts as, one of ``clock.ACTIVITIES``.
    """

    every: int = 1
    activity: str = "other"

    def begin(self, progress: Progress) -> None:
        """Before the first step."""

    def facts(self, progress: Progress) -> Mapping[str, int]:
        """Numbers of this process's last step; ``progress.totals`` has their sums over all processes.

        What ends a run must be decided by them: a process that stops alone leaves the others waiting.
        """
        del progress
        return {}

    def step(self, progress: Progress) -> None:
        """After ``progress.done`` steps, a multiple of ``every``."""

    def finish(self, progress: Progress) -> None:
        """The last step is done, or ``progress.error`` ends the run."""


def run_loop(
    step_fn: Step,
    state: TrainState,
    frozen: tree.Tree,
    batches: Batches,
    mesh: Mesh,
    steps: int,
    callbacks: Sequence[Callback],
    clock: Clock | None = None,
) -> TrainState:
    """Trains from ``state.step`` to ``steps`` and returns the last state.

    Raises whatever ends the run earlier (DataEnded, the ``Stopped`` of a callback, any error of the data or a step)
    after all callbacks have finished, or the CheckpointError that made "saved" untrue. Only KeyboardInterrupt and the
    like leave at once.
    """
    start = int(state.step)
    rows = LocalRows(mesh, batches.batch_size)
    progress = Progress(state, frozen, start, start, steps, counted=rows.counted, clock=clock or Clock())
    stream = batches.iterate(start, rows.numbers) if start < steps else iter(())
    try:
        for callback in callbacks:
            with progress.clock.on(callback.activity):
                callback.begin(progress)
        for _ in range(start, steps):
            _step(progress, stream, step_fn, rows)
            after_step(progress, callbacks)
    except Exception as error:
        progress.error = error
    finally:
        getattr(stream, "close", lambda: None)()
    for callback in callbacks:
        try:
            with progress.clock.on(callback.activity):
                callback.finish(progress)
        except Exception as error:  # the others must finish too; the first error is the one that counts
            unsaved = isinstance(error, CheckpointError) and isinstance(progress.error, Stopped)
            progress.error = error if unsaved else progress.error or error
    if progress.error is not None:
        raise progress.error
    return progress.state


def after_step(progress: Progress, callbacks: Sequence[Callback]) -> None:
    """Starts to add up what the callbacks have to say of the step, and gives each its turn."""
    facts = (callback.facts(progress) for callback in callbacks)
    progress.totals.add(
        progress.done, dict(itertools.chain.from_iterable(each.items() for each in facts)), progress.metrics
    )
    for callback in callbacks:
        if progress.done % callback.every == 0:
            with progress.clock.on(callback.activity):
                callback.step(progress)


def _step(progress: Progress, stream: Iterator[Any], step_fn: Step, rows: LocalRows) -> None:
    before = time.perf_counter()
    with progress.clock.on("data"):
        item = next(stream, None)
    if item is None:
        raise DataEnded(
            f"the data ends at step {progress.done}, the stage at {progress.steps}; saved: "
            "raise data.epochs (None = endlessly) or lower steps, and run again"
        )
    number, progress.batch = item
    progress.data_wait = time.perf_counter() - before
    with progress.clock.on("dispatch"), jax.profiler.StepTraceAnnotation("train", step_num=number + 1):
        progress.state, progress.metrics = step_fn(progress.state, progress.frozen, rows.put(progress.batch))
    progress.done = number + 1
