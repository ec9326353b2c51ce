"""What happens beside the steps of a run: records, checkpoints, stopping when asked."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mono_jax import tree
from mono_jax.errors import CheckpointError
from mono_jax.training.flops import TokenCounts, count_tokens
from mono_jax.training.loop import Callback, Progress, Stopped
from mono_jax.training.metrics import MetricsWriter, console_line, duration

LAG = 2  # steps between dispatching a step and reading its metrics
PREEMPTED = 75  # exit code after SIGTERM or SIGINT: saved, run again to resume (EX_TEMPFAIL)

Say = Callable[[str], None]


class Preempted(Stopped):
    """The run was asked to stop and has saved its state."""


class NonFinite(Stopped):
    """Too many updates in a row were not finite. The state is not saved: ``first`` is the first step of the streak."""

    def __init__(self, message: str, first: int):
        super().__init__(message)
        self.first = first


class TooManyBadSamples(Stopped):
    """The share of bad samples is above the limit."""


@dataclasses.dataclass
class _Pending:
    done: int
    metrics: Mapping[str, jax.Array]
    counts: TokenCounts
    data_wait: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """What rates are reported against.

    Attributes:
      flops: model FLOPs of the tokens counted.
      peak: FLOP/s of this process's devices at most; None = not known, and no MFU is reported.
    """

    flops: Callable[[Mapping[str, float]], float]
    peak: float | None

    def mfu(self, counts: Mapping[str, float], seconds: float) -> float | None:
        """Share of the peak that the work of ``counts`` in ``seconds`` makes."""
        return None if self.peak is None else self.flops(counts) / seconds / self.peak


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
        counts: Callable[[], Mapping[str, float]] = dict,
    ):
        """``sample_keys``: of a step; ``counts``: what else each record holds, e.g. of the data."""
        self._stage, self._log_every, self._max_nonfinite_steps = stage, log_every, max_nonfinite_steps
        self._speed, self._sample_keys, self._writer, self._say = speed, sample_keys, writer, say
        self._counts = counts
        self._pending: collections.deque[_Pending] = collections.deque()
        self._began = time.perf_counter()
        self._clear(self._began)

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
            self._say(f"first step after {duration(self._since - self._began)}, compilation included")
        self._drain(progress, keep=LAG)

    def finish(self, progress: Progress) -> None:
        if not isinstance(progress.error, NonFinite):  # what was in flight behind it says the same again
            self._drain(progress, keep=0)

    def before_save(self, progress: Progress) -> None:
        """Records what a checkpoint of this moment will not bring again."""
        self._drain(progress, keep=0)

    def _drain(self, progress: Progress, keep: int) -> None:
        while len(self._pending) > keep:
            self._record(self._pending.popleft(), progress)

    def _record(self, pending: _Pending, progress: Progress) -> None:
        values = {name: value.item() for name, value in jax.device_get(dict(pending.metrics)).items()}
        self._window.update(steps=1, wait=pending.data_wait, **pending.counts)
        if values["nonfinite"]:
            self._report_nonfinite(pending.done, values, progress)
        else:
            self._losses.append(values["loss"])
        if pending.done % self._log_every == 0 or pending.done == progress.steps:
            self._log(pending.done, progress.steps, values)

    def _log(self, done: int, steps: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        window, count = self._window, self._window["steps"]
        per_step = max(now - self._since, 1e-9) / count
        rates = {name.removeprefix("lr/"): value for name, value in values.items() if name.startswith("lr/")}
        record: dict[str, Any] = {"step": done, "stage": self._stage, "time": time.time()}
        record |= {name: values[name] for name in ("loss", "grad_norm", "weight", "skipped")}
        record["loss_mean"] = sum(self._losses) / len(self._losses) if self._losses else None
        record |= {"lr": max(rates.values()), **{f"lr/{group}": rate for group, rate in rates.items()}}
        record |= {
            "tokens_per_s": (window["visual"] + window["text"]) / count / per_step,
            "mfu": self._speed.mfu(window, count * per_step),
            "data_wait": window["wait"] / count / per_step,
            "step_s": per_step,
            "eta_s": (steps - done) * per_step,
        }
        record |= self._counts()
        if self._writer is not None:
            self._writer.write(record)
            self._say(console_line(self._stage, steps, record))
        self._clear(now)

    def _report_nonfinite(self, done: int, values: Mapping[str, float], progress: Progress) -> None:
        keys = self._sample_keys(done - 1)
        shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._say(f"step {done}: {what}: the update is not finite and is skipped; samples: {shown}")
        if values["nonfinite_steps"] < self._max_nonfinite_steps:
            return
        first = done - int(values["nonfinite_steps"]) + 1
        if ruined := nonfinite_paths(progress.frozen):
            cause = f"frozen weights that are not finite: {', '.join(ruined[:5])}; use sound initial weights"
        else:
            cause = (
                f"samples of the last step: {shown}. Lower the learning rate, or leave these steps out with "
                f"--config.skip_steps='[[{first},{done}]]', and run again: it resumes before step {first}"
            )
        raise NonFinite(
            f"{done - first + 1} updates in a row were not finite, steps {first} to {done} ({what}); {cause}", first
        )


def nonfinite_paths(params: tree.Tree) -> list[str]:
    """Paths of the arrays that hold a value that is not finite."""
    sound = jax.device_get(jax.jit(lambda p: jax.tree.map(lambda a: jnp.isfinite(a).all(), p))(params))
    return [path for path, finite in tree.flatten(sound).items() if not finite]


class BadSampleLimit(Callback):
    """Ends the run when the share of bad samples among the newest ones is above ``limit``."""

    def __init__(self, report: SampleReport, limit: float):
        self._report, self._limit = report, limit

    def step(self, progress: Progress) -> None:
        if (share := self._report.bad_share()) > self._limit:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._report.skipped.most_common(5))
            raise TooManyBadSamples(
                f"{share:.1%} of the last samples are bad, more than the limit of {self._limit:.1%} "
                f"({reasons} in all); saved: look at the data (python -m data_pipelines.check), or raise "
                "--config.max_bad_share, and run again"
            )


class StopWhenAsked(Callback):
    """Ends the run after SIGTERM or SIGINT, caught while this context is entered. A second SIGINT interrupts.

    ``hurry`` is called when the signal comes, to end waiting that a step may be held up by.
    """

    def __init__(self, hurry: Callable[[], None] = lambda: None):
        self._hurry = hurry

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
        again = "; Ctrl-C again: at once, unsaved" if number == signal.SIGINT else ""
        # Not print: the handler may have interrupted one.
        os.write(2, f"stopping after this step{again}\n".encode())
        self._hurry()

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

    def save(self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True) -> None: ...

    def discard_from(self, step: int) -> None: ...

    def wait(self) -> None: ...


class SampleReport(Protocol):
    """What ``BadSampleLimit`` needs of the data's report (``data_pipelines.loading.report.Report``)."""

    skipped: collections.Counter[str]

    def bad_share(self) -> float: ...


class Checkpointing(Callback):
    """Saves the state after every ``every``-th step, and when the run ends, whatever ends it.

    A save that fails during the run is reported and counted, and the next one is made. While updates are not finite no
    state is saved but the last; one that a failed step has consumed cannot be saved. ``before_save`` is called first.
    """

    def __init__(
        self,
        checkpoints: Saver,
        every: int,
        metadata: Callable[[], Mapping[str, Any]],
        say: Say,
        before_save: Callable[[Progress], None] = lambda progress: None,
    ):
        self.every, self.failed = every, 0
        self._checkpoints, self._metadata, self._say, self._before_save = checkpoints, metadata, say, before_save

    def step(self, progress: Progress) -> None:
        if progress.done == progress.steps:
            return
        self._before_save(progress)
        if int(progress.state.nonfinite_steps):
            self._say(f"step {progress.done} is not saved: its update was not finite")
            return
        try:
            self._checkpoints.save(progress.done, vars(progress.state), self._metadata())
        except CheckpointError as error:
            self.failed += 1
            self._say(f"{error} (failed saves so far: {self.failed}); training continues")

    def finish(self, progress: Progress) -> None:
        if isinstance(progress.error, NonFinite):
            self._checkpoints.discard_from(progress.error.first)
        elif any(leaf.is_deleted() for leaf in jax.tree.leaves(progress.state)):
            self._say(f"the state of step {progress.done} is lost in the failed step: the newest checkpoint stands")
        elif progress.done > progress.start or progress.error is not None:
            # In a streak of updates that are not finite the state may be ruined already: older ones stay beside it.
            rotate = not int(progress.state.nonfinite_steps)
            self._checkpoints.save(progress.done, vars(progress.state), self._metadata(), rotate=rotate)
        self._checkpoints.wait()
