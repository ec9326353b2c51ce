"""Profiler traces of devices and host for selected steps, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
from pathlib import Path
from types import FrameType

import jax

from mono_jax.files import reason
from mono_jax.training.callbacks.signals import OnSignals
from mono_jax.training.loop import Progress
from mono_jax.training.metrics import Say

SIGNAL = signal.SIGUSR2  # SIGUSR1 makes data workers stop waiting
SIGNAL_STEPS = 5  # steps in a trace requested by the signal


@dataclasses.dataclass(frozen=True)
class _Trace:
    first: int
    last: int
    folder: Path

    def __str__(self) -> str:
        return f"profile of the steps {self.first} to {self.last}"


class Profiling(OnSignals):
    """Writes traces below ``folder``, of the steps ``steps`` (first and last) and of those that follow a SIGUSR2.

    Each process writes its own, so the signal may be sent to one process or to all. It is caught while this context is
    active. A trace that fails is reported, and the run continues.
    """

    signals = (SIGNAL,)

    def __init__(self, folder: Path, steps: tuple[int, int] | None, say: Say):
        self._folder, self._steps, self._say = folder, steps, say
        self._asked = False
        self._open: _Trace | None = None
        self._unwritten: _Trace | None = None  # the profiler keeps it open until it can be written

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def begin(self, progress: Progress) -> None:
        self._start_if_wanted(progress)

    def step(self, progress: Progress) -> None:
        if self._open is not None and progress.done >= self._open.last:
            self._stop(self._open, progress)
        self._start_if_wanted(progress)

    def finish(self, progress: Progress) -> None:
        if self._open is not None:
            self._stop(self._open, progress)

    def _start_if_wanted(self, progress: Progress) -> None:
        if self._open is not None or progress.done == progress.steps:
            return
        last = progress.done + SIGNAL_STEPS if self._asked else 0
        if self._steps is not None and self._steps[0] - 1 <= progress.done < self._steps[1]:
            last, self._steps = max(last, self._steps[1]), None
        self._asked = False
        if last:
            self._start(progress, min(last, progress.steps))

    def _start(self, progress: Progress, last: int) -> None:
        folder = self._folder / f"steps-{progress.done + 1}-{last}"
        if jax.process_count() > 1:  # several may run on one host, and the file is named after the host
            folder /= f"process-{jax.process_index()}"
        trace = _Trace(progress.done + 1, last, folder)
        try:
            with progress.clock.on("wait"):
                jax.block_until_ready(progress.metrics)  # so that earlier steps are not part of the trace
            if self._unwritten is not None:
                jax.profiler.stop_trace()
                self._drop(self._unwritten)
                self._unwritten = None
            if not may_trace():
                raise RuntimeError("this process has loaded libtpu without a TPU: its profiler would crash the process")
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(folder)
            self._open = trace
        except Exception as error:  # whatever the profiler or the disk raises: profiling must not end a run
            self._say(f"{trace} failed: {reason(error)}; training continues")

    def _stop(self, trace: _Trace, progress: Progress) -> None:
        self._open = None
        with progress.clock.on("wait"), contextlib.suppress(Exception):  # reported by whatever reads the metrics
            jax.block_until_ready(progress.metrics)
        try:
            jax.profiler.stop_trace()
            self._say(f"{trace} is in {trace.folder}: view it with tensorboard --logdir {self._folder}")
        except Exception as error:
            self._unwritten = trace
            self._drop(trace)
            self._say(f"{trace} failed: {reason(error)}; training continues")

    def _drop(self, trace: _Trace) -> None:
        """Removes an incomplete trace."""
        shutil.rmtree(trace.folder, ignore_errors=True)


def may_trace() -> bool:
    """Whether a trace can be started. If libtpu was loaded to compile for absent TPUs, a trace would segfault."""
    try:
        loaded = "libtpu" in Path("/proc/self/maps").read_text()
    except OSError:
        return True
    return not loaded or jax.default_backend() == "tpu"
