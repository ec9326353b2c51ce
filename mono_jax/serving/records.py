"""Counts and times of an engine, for ``Stats``."""

from __future__ import annotations

import collections
import time
from typing import Any

import jax

from mono_jax.serving.contract import Finish
from mono_jax.serving.task import Task

KEPT = 4096  # latest values kept of each kind of time
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Records:
    """Counts and times; written by the engine's thread."""

    def __init__(self) -> None:
        self.requests: collections.Counter[Finish] = collections.Counter()
        self.refused = self.tokens_in = self.tokens_cached = self.tokens_out = 0
        self.steps = self.steps_timed = self.chunks = 0
        kept = (collections.deque[float](maxlen=KEPT) for _ in range(4))
        self.first_token_s, self.step_s, self.step_host_s, self.queue_s = kept
        # Accumulated while there is work: wall time, and CPU time of the engine's thread without its waiting.
        self.working_s = self.busy_s = 0.0

    def admitted(self, task: Task) -> None:
        self.tokens_in += task.tokens
        self.tokens_cached += task.cached
        self.queue_s.append(time.perf_counter() - task.submitted_s)

    def stepped(self, seconds: float, host: float) -> None:
        self.steps_timed += 1
        self.step_s.append(seconds)
        self.step_host_s.append(host)

    def ended(self, task: Task) -> None:
        self.requests[task.finish] += 1
        if task.first_token_s:
            self.first_token_s.append(task.first_token_s)

    def values(self) -> dict[str, Any]:
        """The fields of ``Stats`` that are recorded here."""
        names = ("refused", "tokens_in", "tokens_cached", "tokens_out", "steps", "steps_timed", "chunks")
        counts = {name: getattr(self, name) for name in names} | {"requests": dict(self.requests)}
        kept = ("first_token_s", "step_s", "step_host_s", "queue_s")
        times = {name: tuple(getattr(self, name).copy()) for name in kept}
        share = self.busy_s / self.working_s if self.working_s else 0.0
        return counts | times | {"working_s": self.working_s, "host_share": share}


class Compilations:
    """Counts the programs that JAX compiles in this process while it listens."""

    def __init__(self) -> None:
        self.count, self._listening = 0, False

    def _heard(self, name: str, seconds: float, **_: Any) -> None:
        self.count += name == _COMPILED

    def listen(self) -> None:
        self._listening = True
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def stop(self) -> None:
        """May be called at any time: an engine may be closed before it was started, and more than once."""
        if self._listening:
            self._listening = False
            jax.monitoring.unregister_event_duration_listener(self._heard)
