"""The checkpoints of a run: which ones are kept, and how damage and failed saves are handled.

How they are stored differs between a local folder (``orbax_manager``) and a bucket (``object_manager``). In both, a
step becomes visible only once it is complete, and its lists of SHA-256 sums are checked when it is read.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax

from data_pipelines.errors import StorageError
from mono_jax.checkpoints.integrity import check_fit, verify_together
from mono_jax.checkpoints.object_manager import ObjectManager
from mono_jax.checkpoints.orbax_manager import OrbaxManager
from mono_jax.errors import CheckpointError, ConfigError, PeerError
from mono_jax.files import Damaged, reason, write_checksums
from mono_jax.parallel.agreement import Meeting, together
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place, place_of

PyTree = Any


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, those at multiples of ``keep_period`` steps, and the best.

    At least two are kept, since only the steps after the newest one prove that it is sound.

    >>> with Checkpoints("runs/a/checkpoints") as checkpoints:
    ...     checkpoints.save(300, {"step": step, "trainable": params, "opt_state": opt_state}, {"config": ...})
    ...     state, metadata = checkpoints.restore(abstract_state)

    ``asynchronous``: ``save`` returns once the arrays are copied to the host, and writes in the background; an error in
    the background is reported when it happens and raised by the next ``wait``. ``report`` gets one line for each
    damaged checkpoint and each save that failed in the background. ``marker``: a file that is created once a checkpoint
    is complete, and stays even if checkpoints are lost. ``before_commit``: called before a checkpoint in a bucket
    becomes visible; an error that it raises makes the save fail.

    Attributes:
      failed: number of saves that failed, in the background or not.
    """

    def __init__(
        self,
        directory: str | Place,
        keep: int = 3,
        asynchronous: bool = True,
        report: Callable[[str], None] = _to_stderr,
        keep_period: int | None = None,
        marker: Place | None = None,
        before_commit: Callable[[], None] | None = None,
    ):
        if keep < 1:
            raise ConfigError(f"keep is {keep}: at least one checkpoint must be kept")
        self.directory = place_of(directory).absolute()
        self._before_commit = before_commit
        self._keep, self._keep_period = max(keep, 2), keep_period
        self._asynchronous, self._report, self._marker = asynchronous, report, marker
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self.failed = 0
        self._saved: int | None = None
        self._best: int | None = None
        self._sound: set[int] = set()  # steps whose files have been verified
        self._meetings = itertools.count()
        self._meeting: Meeting | None = None  # of the save in flight, with several processes
        self._manager = self._open()

    def _open(self) -> ObjectManager | OrbaxManager:
        try:
            if isinstance(self.directory, ObjectPath):
                return ObjectManager(self.directory, self._before_commit)
            return OrbaxManager(self.directory, self._asynchronous)
        except (OSError, PeerError) as error:
            raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {reason(error)}") from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a save in flight, raises its CheckpointError, and releases Orbax's threads. Does not wait for other
        processes, because an error in this one may be the reason for closing."""
        self._join()
        self._manager.close()
        if self._error is not None:
            raise self._error

    def steps(self) -> list[int]:
        """Committed steps, oldest first; waits for a save in flight."""
        self.wait()
        return self._manager.all_steps()

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], *, rotate: bool = True, best: int | None = None
    ) -> bool:
        """Saves ``state`` (arrays) and ``metadata`` (JSON) as ``step``; returns False if that step is already saved.

        After ``restore(step=...)`` of an older step, the next save deletes the checkpoints after it. ``rotate``:
        whether to remove old checkpoints once this one is complete. ``best``: the step of a checkpoint to keep; while
        that step has no checkpoint (because its save failed), the previously named one is kept.
        Raises CheckpointError if this save failed (a full disk, say); checkpoints saved earlier stay.
        """
        with contextlib.suppress(CheckpointError):  # from the previous save, reported when it happened
            self.wait()
        if step == self._saved:
            return False
        self._meeting = None
        if jax.process_count() > 1:
            self._meeting = Meeting(f"{self.directory}/{step}/{next(self._meetings)}")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
        try:
            self.discard_from(step)  # the run went back to an older step: later ones are no longer its history
        except (StorageError, PeerError) as error:  # all processes have them
            raise self._not_saved(step, error) from None
        try:
            with together():
                self._manager.prepare(step, size)
            with together():
                self._manager.save(step, state, metadata, self._meeting)
        except Exception as error:
            self._recover()
            raise self._not_saved(step, error) from None
        self._thread = threading.Thread(target=self._finish, args=(step, rotate, best), name=f"checkpoint-{step}")
        self._thread.start()
        if not self._asynchronous:
            self.wait()
        return True

    def discard_from(self, step: int) -> None:
        """Deletes the checkpoints of ``step`` and after it."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        for later in self.steps():
            if later >= step:
                self._sound.discard(later)
                self._manager.discard(later)
                self._saved = None if self._saved == later else self._saved
        if self._marker is not None and not self.steps():  # discarded, not lost
            self._marker.unlink(missing_ok=True)

    def _finish(self, step: int, rotate: bool, best: int | None) -> None:
        try:
            self._manager.finish(step)
            if jax.process_index() == 0 and self._marker is not None:
                self._marker.touch()
            self._best = best if best in self._manager.all_steps() else self._best
            if rotate:
                self._rotate()
            if self._meeting is not None:
                self._meeting.pass_on()
            self._saved = step
        except Exception as error:
            if self._meeting is not None:
                self._meeting.fail(error)
            self._error = self._not_saved(step, error)
            if self._asynchronous:
                self._report(f"{self._error} (failed saves so far: {self.failed})")

    def _rotate(self) -> None:
        """Removes all but the newest ``keep`` checkpoints, the milestones and the best one."""
        for old in self._manager.all_steps()[: -self._keep]:
            if old != self._best and (not self._keep_period or old % self._keep_period):
                self._sound.discard(old)
                with contextlib.suppress(StorageError):  # the next save tries again
                    self._manager.delete(old)

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        self.failed += 1
        return CheckpointError(
            f"{self.directory}: step {step} was not saved: {reason(error)}; earlier checkpoints are intact; free some "
            "space and run again to resume from the newest"
        )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Blocks until the save in flight is on disk; raises CheckpointError if it failed."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            self._recover()
            raise error

    def _recover(self) -> None:
        try:
            self._manager.recover()
        except (OSError, PeerError) as error:
            raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {reason(error)}") from None

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata of the checkpoint that ``restore`` would restore; damaged checkpoints are handled as in
        ``restore``."""
        return self._first_sound(step, self._read_metadata)

    def restore(
        self, abstract_state: PyTree, step: int | None = None, *, part: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state and metadata of ``step``, by default of the newest sound checkpoint.

        ``abstract_state``: arrays or jax.ShapeDtypeStruct in the structure wanted; their shardings decide where each
        array goes, regardless of the mesh it was saved from. ``part``: only the entries of the state that it has are
        restored. A damaged checkpoint is reported, renamed to ``damaged-STEP`` and skipped. Raises CheckpointError if
        there is no sound one, if ``step`` is damaged, or (listing all differences) if the checkpoint's arrays differ
        from ``abstract_state``.
        """
        return self._first_sound(step, lambda candidate: self._read(candidate, abstract_state, part))

    def _first_sound(self, step: int | None, read: Callable[[int], Any]) -> Any:
        damaged: dict[int, Damaged] = {}
        for candidate in self._existing(step):
            try:
                result = read(candidate)
            except Damaged as error:
                damaged[candidate] = error
                continue
            for other, error in damaged.items():
                if jax.process_index() == 0:
                    self._report(f"{error}; using step {candidate}")
                self._set_aside(other)
            return result
        listed = "; ".join(map(str, damaged.values()))
        if step is not None:
            raise CheckpointError(f"{listed}; choose another of the steps {self.steps()}")
        raise CheckpointError(f"{listed}; no other checkpoint is left: start in a new workdir")

    def _existing(self, step: int | None) -> list[int]:
        steps = self.steps()[::-1]
        if not steps:
            raise CheckpointError(f"{self.directory}: contains no checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}: there are {steps[::-1]}")
        return steps if step is None else [step]

    def _verified(self, step: int) -> bool:
        """Whether the step's files are known to be sound (False = unknown); raises Damaged."""
        if step not in self._sound and verify_together(self.directory / str(step)):
            self._sound.add(step)
        return step in self._sound

    def _read_metadata(self, step: int) -> dict[str, Any]:
        self._verified(step)
        try:
            return self._manager.metadata(step)
        except StorageError:
            raise
        except Exception as error:
            raise Damaged(f"{self.directory / str(step)}: damaged metadata: {reason(error)}") from None

    def _read(self, step: int, abstract_state: PyTree, part: bool) -> tuple[PyTree, dict[str, Any]]:
        folder = self.directory / str(step)
        verified = self._verified(step)
        try:
            check_fit(folder, self._manager.stored(step), abstract_state, part)
            restored = self._manager.state(step, abstract_state), self._manager.metadata(step)
        except (CheckpointError, StorageError):
            raise
        except Exception as error:
            if verified:
                raise CheckpointError(f"{folder}: cannot be restored: {reason(error)}") from error
            raise Damaged(f"{folder}: damaged: {reason(error)}") from None
        if not verified and jax.process_index() == 0:  # killed between the commit and its list
            with contextlib.suppress(OSError):
                write_checksums(folder)
        return restored

    def _set_aside(self, step: int) -> None:
        if step == self._saved:
            self._saved = None
        self._manager.set_aside(step)
