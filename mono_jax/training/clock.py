"""Where the time of a run goes: every moment belongs to exactly one activity, so that they sum to the wall time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

ACTIVITIES: dict[str, str] = {
    "start": "opening the data, making or restoring the state",
    "data": "waiting for the next batch",
    "compile": "tracing and compiling, for any purpose",
    "dispatch": "dispatching batches and steps to the devices; on CPUs also part of the computation",
    "wait": "waiting for the devices to compute",
    "save": "saving checkpoints, where the run waits for it",
    "evaluate": "evaluating",
    "finish": "writing the model folder",
    "other": "everything else: records, profiles, Python",
}
_COMPILING = "/jax/core/compile/"  # prefix of JAX's events for tracing, lowering and compiling


class Clock:
    """Seconds by activity since its creation, on a monotonic clock.

    ``on`` changes the activity for a while. While the clock itself is active as a context, compilation by the thread
    that created the clock is detected through JAX's own events, and subtracted from the activity in which it happened.
    """

    def __init__(self, activity: str = "other", now: Callable[[], float] = time.monotonic):
        self._now, self._activity = now, activity
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._since = now()
        self._thread = threading.get_ident()
        self._compiled: list[tuple[float, float]] = []  # disjoint compilation intervals within the current activity

    def __enter__(self) -> Clock:
        jax.monitoring.register_event_duration_secs_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._event)

    @contextlib.contextmanager
    def on(self, activity: str) -> Iterator[None]:
        """Time in this context counts as ``activity``, except for what an inner ``on`` claims."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    @property
    def activity(self) -> str:
        """What time currently counts as; may be read from other threads."""
        return self._activity

    def read(self) -> dict[str, float]:
        """Seconds of each of ``ACTIVITIES`` so far."""
        self.switch(self._activity)
        return dict(self._seconds)

    def switch(self, activity: str) -> str:
        """Makes time count as ``activity`` from now on; returns the previous activity."""
        now, before = self._now(), self._activity
        compiled = min(sum(end - start for start, end in self._compiled), now - self._since)
        self._seconds["compile"] += compiled
        self._seconds[before] += now - self._since - compiled
        self._since, self._activity = now, activity
        self._compiled.clear()
        return before

    def _event(self, name: str, seconds: float, **_: object) -> None:
        """An interval that ends now; one that encloses earlier ones replaces them."""
        if name.startswith(_COMPILING) and threading.get_ident() == self._thread:
            end = self._now()
            start = max(end - seconds, self._since)
            while self._compiled and self._compiled[-1][0] >= start:
                self._compiled.pop()
            if self._compiled:
                start = max(start, self._compiled[-1][1])
            self._compiled.append((start, end))


def table(seconds: Mapping[str, float]) -> list[str]:
    """Lines of a table of the activities that took time, and their sum."""
    total = sum(seconds.values())
    rows = {name: value for name, value in seconds.items() if value > 0} | {"total": total}
    return [
        f"  {name:8} {value:10.2f} s {value / max(total, 1e-9):6.1%}  {ACTIVITIES.get(name, '')}".rstrip()
        for name, value in rows.items()
    ]
