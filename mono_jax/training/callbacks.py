"""What happens beside the steps of a run: records, checkpoints, stopping when asked."""

from __future__ import annotations

import collections
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from mono_jax.training.flops import TokenCounts, count_tokens
from mono_jax.training.loop import Callback, Progress, Stopped
from mono_jax.training.metrics import MetricsWriter, console_line

LAG = 2  # steps between dispatching a step and reading its metrics
PREEMPTED = 75  # exit code after SIGTERM or SIGINT: saved, run again to resume (EX_TEMPFAIL)

Say = Callable[[str], None]


class Preempted(Stopped):
    """The run was asked to stop and has saved its state."""


class NonFinite(Stopped):
    """Too many updates in a row were not finite."""


@dataclasses.dataclass
class _Pending:
    done: int
    metrics: Mapping[str, jax.Array]
    counts: TokenCounts
    data_wait: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """What rates are reported against: model FLOPs of the tokens counted, and the peak FLOP/s of this process's
    devices.
    """

    flops: Callable[[Mapping[str, float]], float]
    peak: float


class Recorder(Callback):
    """Turns the metrics of steps into records and console lines, and stops a run that is not finite.

    Metrics are read ``LAG`` steps late, so that the device always has work queued. Only the first step is waited for:
    its compilation is kept out of the rates.
    """

    def __init__(
        self,
        stage: str,
        log_every: int,
        max_nonfinite_steps: int,
        speed: Speed,
        sample_keys: Callable[[int], list[str]],
        writer: MetricsWriter | None,
        say: Say,
    ):
        self._stage, self._log_every, self._max_nonfinite_steps = stage, log_every, max_nonfinite_steps
        self._speed, self._sample_keys, self._writer, self._say = speed, sample_keys, writer, say
        self._pending: collections.deque[_Pending] = collections.deque()
        self._clear(time.perf_counter())

    def _clear(self, now: float) -> None:
        self._window: collections.Counter[str] = collections.Counter()
        self._losses: list[float] = []  # of the steps since the last record
        self._since = now

    def step(self, progress: Progress) -> None:
        counts = count_tokens(progress.batch)
        self._pending.append(_Pending(progress.done, progress.metrics, counts, progress.data_wait))
        if progress.done == progress.start + 1:
            self._drain(progress, keep=0)
            self._window.clear()
            self._since = time.perf_counter()
        self._drain(progress, keep=LAG)

    def finish(self, progress: Progress) -> None:
        if isinstance(progress.error, NonFinite):  # what came after the step that ended the run is of no interest
            return
        try:
            self._drain(progress, keep=0)
        except NonFinite as error:
            progress.error = progress.error or error

    def _drain(self, progress: Progress, keep: int) -> None:
        while len(self._pending) > keep:
            self._record(self._pending.popleft(), progress.steps)

    def _record(self, pending: _Pending, steps: int) -> None:
        values = {name: value.item() for name, value in jax.device_get(dict(pending.metrics)).items()}
        self._window.update(steps=1, wait=pending.data_wait, **pending.counts)
        if values["nonfinite"]:
            self._report_nonfinite(pending.done, values)
        else:
            self._losses.append(values["loss"])
        if pending.done % self._log_every == 0 or pending.done == steps:
            self._log(pending.done, steps, values)

    def _log(self, done: int, steps: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        window, count = self._window, self._window["steps"]
        per_step = max(now - self._since, 1e-9) / count
        rates = {name.removeprefix("lr/"): value for name, value in values.items() if name.startswith("lr/")}
        record: dict[str, Any] = {"step": done, "stage": self._stage}
        record |= {name: values[name] for name in ("loss", "grad_norm", "weight", "skipped")}
        record["loss_mean"] = sum(self._losses) / len(self._losses) if self._losses else None
        record |= {"lr": max(rates.values()), **{f"lr/{group}": rate for group, rate in rates.items()}}
        record |= {
            "tokens_per_s": (window["visual"] + window["text"]) / count / per_step,
            "mfu": self._speed.flops(window) / count / per_step / self._speed.peak,
            "data_wait": window["wait"] / count / per_step,
            "step_s": per_step,
            "eta_s": (steps - done) * per_step,
        }
        if self._writer is not None:
            self._writer.write(record)
            self._say(console_line(self._stage, steps, record))
        self._clear(now)

    def _report_nonfinite(self, done: int, values: Mapping[str, float]) -> None:
        keys = self._sample_keys(done - 1)
        shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._say(f"step {done}: {what} is not finite: update skipped; samples: {shown}")
        if values["nonfinite_steps"] >= self._max_nonfinite_steps:
            raise NonFinite(
                f"{values['nonfinite_steps']} updates in a row were not finite, the last at step {done} ({what}); "
                f"samples of that step: {shown}. Look at them, or lower the learning rate, and run again to resume"
            )


class StopWhenAsked(Callback):
    """Ends the run after SIGTERM or SIGINT, caught while this context is entered. A second SIGINT interrupts."""

    def __enter__(self) -> StopWhenAsked:
        self._requested = False
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def step(self, progress: Progress) -> None:
        if self._agreed():
            raise Preempted(f"stopped at step {progress.done} as asked; saved: run the same command again to resume")

    def _agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call this at the same step."""
        if jax.process_count() == 1:
            return self._requested
        return bool(np.any(multihost_utils.process_allgather(np.array(self._requested))))


class Saver(Protocol):
    """What ``Checkpointing`` needs of ``checkpoints.manager.Checkpoints``."""

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None: ...


class Checkpointing(Callback):
    """Saves the state after every ``every``-th step, and when the run ends."""

    def __init__(self, checkpoints: Saver, every: int, metadata: Callable[[], Mapping[str, Any]]):
        self.every = every
        self._checkpoints, self._metadata = checkpoints, metadata

    def step(self, progress: Progress) -> None:
        if progress.done < progress.steps:
            self._save(progress)

    def finish(self, progress: Progress) -> None:
        if progress.done > progress.start or progress.error is not None:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        self._checkpoints.save(progress.done, vars(progress.state), self._metadata())
