"""Detects steps that take far longer than the others, and prints the stacks of all threads while the stall lasts."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from mono_jax.training.clock import Clock
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import Say, duration

KNOWN = 50  # number of steps for the median
FEWEST = 5  # steps needed before any step counts as long
SHORTEST = 60.0  # seconds: a stall takes at least this long
LONG_BY_NATURE = ("save", "evaluate", "finish")  # activities whose time is not part of a step


class Stalls(Callback):
    """Reports, once per step, a step that takes more than ``factor`` times the median of the last ``KNOWN``, with the
    stacks of all threads; 0 = never. The time of ``LONG_BY_NATURE`` does not count.

    A separate thread watches while the context is active, since the training thread is the one that is stuck.
    """

    def __init__(
        self,
        factor: float,
        say: Say,
        shortest: float = SHORTEST,
        look_every: float = 1.0,
        alert: Callable[[str, int, str], None] = lambda kind, step, text: None,
    ):
        self._factor, self._say, self._shortest, self._look_every = factor, say, shortest, look_every
        self._alert = alert
        self._seconds: collections.deque[float] = collections.deque(maxlen=KNOWN)
        self._clock: Clock | None = None
        self._done, self._aside, self._since, self._before = 0, 0.0, 0.0, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        if self._factor:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._factor:
            self._thread.join()

    def begin(self, progress: Progress) -> None:
        self._next(progress)

    def step(self, progress: Progress) -> None:
        if progress.done > progress.start + 1:  # the first one compiles what is not yet compiled
            self._seconds.append(time.monotonic() - self._since - self._time_aside(progress.clock))
        self._next(progress)

    def finish(self, progress: Progress) -> None:
        self._clock = None

    def _next(self, progress: Progress) -> None:
        self._done, self._aside, self._since = progress.done, 0.0, time.monotonic()
        self._before = self._read(progress.clock)
        self._clock = progress.clock

    def _read(self, clock: Clock) -> float:
        seconds = clock.read()
        return sum(seconds[name] for name in LONG_BY_NATURE)

    def _time_aside(self, clock: Clock) -> float:
        return self._read(clock) - self._before

    def _look_on(self) -> None:
        said, looked = -1, time.monotonic()
        while not self._ended.wait(self._look_every):
            now, clock = time.monotonic(), self._clock
            if clock is not None and clock.activity in LONG_BY_NATURE:
                self._aside += now - looked
            looked = now
            if clock is None or len(self._seconds) < FEWEST or said == self._done:
                continue
            passed, median = now - self._since - self._aside, statistics.median(list(self._seconds))
            if passed > max(self._factor * median, self._shortest):
                said = self._done
                text = f"step {said + 1} has taken {duration(passed)}, the median is {median:.2f} s"
                self._say(f"{text}; stacks of all threads:\n{stacks()}")
                self._alert("stall", said + 1, text)


def stacks() -> str:
    """The stacks of all threads, innermost call first."""
    with tempfile.TemporaryFile() as file, contextlib.suppress(OSError):
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()
    return "unknown: the disk is full"
