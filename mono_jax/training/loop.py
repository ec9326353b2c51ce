"""The training loop: batches in, steps, and callbacks for everything else.

The loop never waits for the device: callbacks get the arrays of a step's metrics, which may not be computed yet.

With several processes, one may get an error that the others do not have, in its data or in a callback. It still takes
part in the steps until the others learn of the error through ``Totals``, ``LAG`` steps later; then all save and end
together. Batches for these steps are read ahead. An error inside a step itself ends its process at once, and the others
through ``parallel.watch``.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.errors import CheckpointError, MonoJaxError, PeerError
from mono_jax.parallel.agreement import together
from mono_jax.parallel.rows import LocalRows
from mono_jax.parallel.totals import LAG, Totals
from mono_jax.training.clock import Clock
from mono_jax.training.state import TrainState
from mono_jax.training.step import Metrics, Step


class Batches(Protocol):
    """What the loop needs from the data (``data_pipelines.loading.packed_data.PackedData``)."""

    batch_size: int

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]: ...


class Stopped(MonoJaxError):
    """A run that ends before its last step, with its state saved unless the message says otherwise.

    With several processes, all raise it after the same step.
    """

    known_to_all = True


class DataEnded(Stopped):
    """The data has fewer steps than the stage."""


@dataclasses.dataclass
class Progress:
    """The progress of a run; callbacks read it, only the loop writes it.

    Attributes:
      state: after ``done`` steps.
      frozen: parameters that never change.
      start: steps done when the loop began.
      done: steps done so far.
      steps: where the stage ends.
      metrics: of the last step, still on the device.
      batch: the last step's rows of this process.
      counted: bool [rows], which of these rows this process counts; the others are counted by another process.
      totals: sums of the callbacks' ``facts`` over all processes.
      data_wait: seconds spent waiting for that batch.
      failure: an error of this process that the others may not know about yet.
      error: the error that ends the run before ``steps``, if any.
      clock: records what the time is spent on.
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
    failure: Exception | None = None
    error: Exception | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)


class Callback:
    """An action besides training: after every ``every``-th step, and when the loop ends.

    Callbacks run in the order given. ``step`` may raise ``Stopped`` to end the run; whatever ends it, ``finish`` still
    runs for all callbacks. ``activity``: what its time counts as, one of ``clock.ACTIVITIES``.
    """

    every: int = 1
    activity: str = "other"

    def begin(self, progress: Progress) -> None:
        """Called before the first step."""

    def facts(self, progress: Progress) -> Mapping[str, int]:
        """Numbers of this process's last step; ``progress.totals`` has their sums over all processes.

        Decisions to end a run must be based on these sums: a process that stops by itself leaves the others waiting.
        """
        del progress
        return {}

    def step(self, progress: Progress) -> None:
        """Called after ``progress.done`` steps, a multiple of ``every``."""

    def finish(self, progress: Progress) -> None:
        """Called when the last step is done, or when ``progress.error`` ends the run."""


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
    after all callbacks have finished, or the CheckpointError that made "saved" untrue. Only KeyboardInterrupt and
    similar exceptions leave immediately.
    """
    start = int(state.step)
    rows = LocalRows(mesh, batches.batch_size)
    progress = Progress(state, frozen, start, start, steps, counted=rows.counted, clock=clock or Clock())
    made = batches.iterate(start, rows.numbers) if start < steps else iter(())
    stream = _ReadAhead(itertools.islice(made, steps - start))
    try:
        for callback in callbacks:
            with progress.clock.on(callback.activity):
                callback.begin(progress)
        progress.failure = stream.fill()
        _agree(progress)
        for _ in range(start, steps):
            _step(progress, stream, step_fn, rows)
            after_step(progress, callbacks)
        _agree(progress)  # about what happened in the last steps
    except PeerError as error:
        progress.error = Stopped(f"{error}; saved: run the same command again to resume")
    except Exception as error:
        if jax.process_count() > 1 and not getattr(error, "known_to_all", False):
            raise  # saving needs all processes
        progress.error = error
    finally:
        getattr(made, "close", lambda: None)()
    for callback in callbacks:
        try:
            with progress.clock.on(callback.activity):
                callback.finish(progress)
        except Exception as error:  # the other callbacks must finish, too; the first error counts
            unsaved = isinstance(error, CheckpointError) and isinstance(progress.error, Stopped)
            progress.error = error if unsaved else progress.error or error
    if progress.error is not None:
        raise progress.error
    return progress.state


def after_step(progress: Progress, callbacks: Sequence[Callback]) -> None:
    """Starts summing the callbacks' facts about the step over all processes, and calls each callback."""
    facts = (callback.facts(progress) for callback in callbacks)
    values = dict(itertools.chain.from_iterable(each.items() for each in facts))
    progress.totals.add(progress.done, values | {"failed": progress.failure is not None}, progress.metrics)
    for callback in callbacks:
        if progress.done % callback.every == 0:
            try:
                with progress.clock.on(callback.activity):
                    callback.step(progress)
            except Exception as error:
                if jax.process_count() == 1 or getattr(error, "known_to_all", False):
                    raise
                progress.failure = progress.failure or error
    if progress.totals.latest(progress.done).get("failed"):
        _agree(progress)


def _agree(progress: Progress) -> None:
    """Raises this process's failure, or PeerError for that of another; all processes must call this."""
    with together():
        if progress.failure is not None:
            raise progress.failure


class _ReadAhead:
    """Batches, read far enough ahead that each process learns of an error in its data before the others need its
    batch."""

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._depth = batches, LAG + 1 if jax.process_count() > 1 else 0
        self._queue: collections.deque[Any] = collections.deque()

    def fill(self) -> Exception | None:
        """Reads as far ahead as needed; returns the error that prevents it."""
        try:
            self._queue.extend(itertools.islice(self._batches, self._depth - len(self._queue)))
        except Exception as error:
            return error
        return None

    def next(self) -> Any:
        """The next batch; None after the last."""
        return self._queue.popleft() if self._queue else next(self._batches, None)


def _step(progress: Progress, stream: _ReadAhead, step_fn: Step, rows: LocalRows) -> None:
    before = time.perf_counter()
    with progress.clock.on("data"):
        item = stream.next()
    if item is None:
        raise DataEnded(
            f"the data ends at step {progress.done}, the stage at {progress.steps}; saved: raise data.epochs (None = "
            "unlimited) or lower steps, and run again"
        )
    number, progress.batch = item
    progress.data_wait = time.perf_counter() - before
    with progress.clock.on("dispatch"), jax.profiler.StepTraceAnnotation("train", step_num=number + 1):
        progress.state, progress.metrics = step_fn(progress.state, progress.frozen, rows.put(progress.batch))
    progress.done = number + 1
    if progress.failure is None:
        with progress.clock.on("data"):
            before = time.perf_counter()
            progress.failure = stream.fill()
            progress.data_wait += time.perf_counter() - before
