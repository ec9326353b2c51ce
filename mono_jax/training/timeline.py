"""WORKDIR/timeline.jsonl: how all processes that ever worked on a run spent their time, including lost work.

Unlike in metrics.jsonl, nothing is ever removed. One object per line, written by process 0; with several processes,
process N writes its own WORKDIR/logs/timeline-N.jsonl:

    event     "start" of a process, "step" while training, "save", "end" (missing if a process was killed);
              "measure" before or after it, by evip.py
    step      steps done; in "start" it is where the process resumed, so later steps of earlier processes were lost
    time      seconds since 1970
    seconds   since the previous line, on a monotonic clock, by activity (``clock.ACTIVITIES``; 0 is left out)
    bytes, waited_s     in "save": size of the state, and the seconds that training waited
    compilation_cache   in "end": programs found and added, seconds saved
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mono_jax.training.clock import Clock, table
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Appender, Say


def timeline_file(workdir: Path, process: int = 0) -> Path:
    """The timeline of one of a run's processes."""
    return workdir / "timeline.jsonl" if process == 0 else workdir / "logs" / f"timeline-{process}.jsonl"


@contextlib.contextmanager
def measuring(file: Path, say: Say, step: int | None = None) -> Iterator[None]:
    """Adds a line that counts the time in this context as evaluation, before or after a process of the run."""
    began = time.monotonic()
    yield
    file.parent.mkdir(parents=True, exist_ok=True)
    seconds = {"evaluate": round(time.monotonic() - began, 6)}
    entry = {"event": "measure", "step": step, "time": round(time.time(), 3), "seconds": seconds}
    Appender(file, "the timeline", say).write(json.dumps(entry).encode() + b"\n")


class Timeline(Callback):
    """Adds a line to ``file`` at every ``every``-th step."""

    def __init__(self, file: Path, clock: Clock, say: Say, every: int = 1):
        self.every, self.clock = every, clock
        self._step: int | None = None  # None until the process knows where it starts
        self._file = Appender(file, "the timeline", say)
        self.seconds: dict[str, float] = {}  # the clock's readings at the last line

    def begin(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):  # reported when writing
            self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self.add("start", progress.start)

    def step(self, progress: Progress) -> None:
        self.add("step", progress.done)

    def finish(self, progress: Progress) -> None:
        self._step = progress.done

    def add(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Adds a line; ``step``: None = the last known one. ``facts``: further entries."""
        self._step = self._step if step is None else step
        seconds = self.clock.read()
        passed = {name: round(value - self.seconds.get(name, 0.0), 6) for name, value in seconds.items()}
        self.seconds = seconds
        entry = {"event": event, "step": self._step, "time": round(time.time(), 3)}
        entry["seconds"] = {name: value for name, value in passed.items() if value}
        self._file.write(json.dumps(entry | facts).encode() + b"\n")

    def close(self, **facts: Any) -> list[str]:
        """Adds the last line, and returns a table of the process's time; does nothing if it did not reach training."""
        if self._step is None:
            return []
        self.add("end", **facts)
        self._file.close()
        return ["time of this run:", *table(self.seconds)]
