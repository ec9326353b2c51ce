"""Saving the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from mono_jax.errors import CheckpointError
from mono_jax.training.callbacks.stopping import NonFinite
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Say


class Saver(Protocol):
    """What ``Checkpointing`` needs of ``checkpoints.manager.Checkpoints``."""

    failed: int

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True, best: int | None = None
    ) -> None: ...

    def discard_from(self, step: int) -> None: ...

    def wait(self) -> None: ...


class Checkpointing(Callback):
    """Saves the state after every ``every``-th step and after the best, and when the run ends, whatever ends it.

    A save that fails during the run is reported and counted, and the next one is made. While updates are not finite no
    state is saved but the last (``skipped`` counts them); one that a failed step has consumed cannot be saved.
    ``before_save`` is called first. ``best``: the step that was the best so far; its checkpoint is not rotated away.
    """

    activity = "save"

    def __init__(
        self,
        checkpoints: Saver,
        every: int,
        metadata: Callable[[], Mapping[str, Any]],
        say: Say,
        before_save: Callable[[Progress], None] = lambda progress: None,
        best: Callable[[], int | None] = lambda: None,
    ):
        self._every, self.skipped, self._best = every, 0, best
        self._checkpoints, self._metadata, self._say, self._before_save = checkpoints, metadata, say, before_save

    def step(self, progress: Progress) -> None:
        if progress.done == progress.steps or (progress.done % self._every and progress.done != self._best()):
            return
        self._before_save(progress)
        if int(progress.state.nonfinite_steps):
            self.skipped += 1
            self._say(f"step {progress.done} is not saved: its update was not finite")
            return
        try:
            self._checkpoints.save(progress.done, vars(progress.state), self._metadata(), best=self._best())
        except CheckpointError as error:
            self._say(f"{error} (failed saves so far: {self._checkpoints.failed}); training continues")

    def finish(self, progress: Progress) -> None:
        try:
            self._save_last(progress)
            self._checkpoints.wait()
        except CheckpointError as error:
            if progress.error is not None:  # which may be what the run ends with
                self._say(str(error))
            raise

    def _save_last(self, progress: Progress) -> None:
        if isinstance(progress.error, NonFinite):
            self._checkpoints.discard_from(progress.error.first)
        elif any(leaf.is_deleted() for leaf in jax.tree.leaves(progress.state)):
            self._say(f"the state of step {progress.done} is lost in the failed step: the newest checkpoint stands")
        elif progress.done > progress.start or progress.error is not None:
            # In a streak of updates that are not finite the state may be ruined already: older ones stay beside it.
            rotate = not int(progress.state.nonfinite_steps)
            metadata, best = self._metadata(), self._best()
            self._checkpoints.save(progress.done, vars(progress.state), metadata, rotate=rotate, best=best)
