"""Saves the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from mono_jax.errors import CheckpointError
from mono_jax.training.callbacks.stopping import NonFinite
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Say


class Saver(Protocol):
    """What ``Checkpointing`` needs from ``checkpoints.manager.Checkpoints``."""

    failed: int

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True, best: int | None = None
    ) -> bool: ...

    def discard_from(self, step: int) -> None: ...

    def wait(self) -> None: ...


class Checkpointing(Callback):
    """Saves the state after every ``every``-th step, every ``minutes``, after the best step, and when the run ends.

    A save that fails during the run is reported and counted, and training continues to the next one. While updates are
    non-finite, only the last state is saved (``skipped`` counts the others); a state that a failed step has consumed
    cannot be saved.
    ``metadata``: returns the metadata of a step. ``before_save`` is called first. ``best``: returns the best step so
    far, whose checkpoint is not rotated away.

    The first process counts the ``minutes`` since the last save (None = only steps decide); the others learn of it
    through ``progress.totals``, so that all save the same step. ``record`` is called with (step, bytes, seconds that
    training waited) for each save.
    """

    activity = "save"

    def __init__(
        self,
        checkpoints: Saver,
        every: int,
        metadata: Callable[[int], Mapping[str, Any]],
        say: Say,
        before_save: Callable[[Progress], None] = lambda progress: None,
        best: Callable[[], int | None] = lambda: None,
        minutes: float | None = None,
        record: Callable[[int, int, float], None] = lambda step, size, waited: None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._every, self.skipped, self._best = every, 0, best
        self._checkpoints, self._metadata, self._say, self._before_save = checkpoints, metadata, say, before_save
        self._seconds, self._record, self._now = None if minutes is None else 60 * minutes, record, now
        self._last, self._since = 0, now()  # step and time of the last save, or of the last request for one

    def begin(self, progress: Progress) -> None:
        self._last, self._since = progress.start, self._now()

    def facts(self, progress: Progress) -> Mapping[str, int]:
        if self._seconds is None:
            return {}
        due = jax.process_index() == 0 and self._now() - self._since >= self._seconds
        if due:
            self._since = self._now()  # requested once: all processes learn of it some steps later
        return {"save_now": int(due)}

    def step(self, progress: Progress) -> None:
        totals = progress.totals
        # A request from before the last save has already been served.
        called = totals.latest(progress.done).get("save_now") and progress.done - totals.lag > self._last
        wanted = called or progress.done % self._every == 0 or progress.done == self._best()
        if progress.done == progress.steps or not wanted:
            return
        self._last, self._since = progress.done, self._now()
        self._before_save(progress)
        if int(progress.state.nonfinite_steps):
            self.skipped += 1
            self._say(f"step {progress.done} is not saved: its update was non-finite")
            return
        try:
            self._save(progress)
        except CheckpointError as error:
            self._say(f"{error} (failed saves so far: {self._checkpoints.failed}); training continues")

    def _save(self, progress: Progress, rotate: bool = True) -> None:
        began = time.perf_counter()
        state = vars(progress.state)
        metadata = self._metadata(progress.done)
        if not self._checkpoints.save(progress.done, state, metadata, rotate=rotate, best=self._best()):
            return
        waited, size = time.perf_counter() - began, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._record(progress.done, size, waited)
        self._say(f"checkpoint of step {progress.done}: {size / 1e9:.3g} GB, training waited {waited:.2f} s")

    def finish(self, progress: Progress) -> None:
        try:
            self._save_last(progress)
            self._checkpoints.wait()
        except CheckpointError as error:
            if progress.error is not None:  # the run may end with that error instead
                self._say(str(error))
            raise

    def _save_last(self, progress: Progress) -> None:
        if isinstance(progress.error, NonFinite):
            self._checkpoints.discard_from(progress.error.first)
        elif any(leaf.is_deleted() for leaf in jax.tree.leaves(progress.state)):
            self._say(f"the state of step {progress.done} was lost in the failed step; the newest checkpoint remains")
        elif progress.done > progress.start or progress.error is not None:
            # During a streak of non-finite updates the state may already be corrupt, so older checkpoints are kept,
            # too.
            self._save(progress, rotate=not int(progress.state.nonfinite_steps))
