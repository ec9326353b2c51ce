"""The training loop: batches in, steps, metrics, checkpoints.

The loop never waits for the device: a step's metrics are read when ``LAG`` later steps have been
dispatched.
"""

from __future__ import annotations

import collections
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.checkpoints.checkpoint import Checkpoints
from mono_jax.errors import MonoJaxError
from mono_jax.parallel.sharding import put_batch
from mono_jax.training import metrics
from mono_jax.training.step import State, Step

LAG = 2  # steps between dispatching a step and reading its metrics
PREEMPTED = 75  # exit code after SIGTERM or SIGINT: saved, run again to go on (EX_TEMPFAIL)


class Batches(Protocol):
    """What the loop needs of the data (``data_pipelines.loading.packed_data.PackedData``)."""

    def iterate(
        self, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]: ...

    def sample_keys(self, step: int) -> list[str]: ...


class Preempted(MonoJaxError):
    """The run was asked to stop and has saved its state."""


class DataEnded(MonoJaxError):
    """The data has fewer steps than the stage."""


class NonFinite(MonoJaxError):
    """Too many updates in a row were not finite."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """``steps``: where the stage ends. ``max_bad_steps``: updates in a row that may be skipped as not finite."""

    stage: str
    steps: int
    log_every: int = 10
    checkpoint_every: int = 1000
    max_bad_steps: int = 10


class StopSignal:
    """Catches SIGTERM and SIGINT while inside; ``requested`` tells whether one came. A second SIGINT interrupts."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes must call this at the same step."""
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.array(self.requested))))


@dataclasses.dataclass
class _Pending:
    step: int
    values: Mapping[str, jax.Array]
    counts: metrics.TokenCounts
    wait: float


class Recorder:
    """Turns the metrics of steps into records and console lines, and stops a run that is not finite."""

    def __init__(
        self,
        options: LoopOptions,
        flops: Callable[[Mapping[str, float]], float],
        peak: float,
        sample_keys: Callable[[int], list[str]],
        writer: metrics.MetricsWriter | None,
        say: Callable[[str], None],
    ):
        self._options, self._flops, self._peak = options, flops, peak
        self._sample_keys, self._writer, self._say = sample_keys, writer, say
        self._window = collections.Counter()
        self._losses: list[float] = []  # of the steps since the last record
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves what happened so far (the first step, with its compilation) out of the rates."""
        self._window.clear()
        self._since = time.perf_counter()

    def record(self, pending: _Pending) -> None:
        """Reads one step's metrics. Raises NonFinite after ``max_bad_steps`` bad ones in a row."""
        values = {name: value.item() for name, value in jax.device_get(dict(pending.values)).items()}
        self._window.update(steps=1, wait=pending.wait, **pending.counts)
        if values["bad"]:
            self._report_bad(pending.step, values)
        else:
            self._losses.append(values["loss"])
        # Step numbers count finished steps, so the last one equals ``steps``.
        done = pending.step + 1
        if done % self._options.log_every == 0 or done == self._options.steps:
            self._log(done, values)

    def _log(self, done: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        window, steps = self._window, self._window["steps"]
        per_step = max(now - self._since, 1e-9) / steps
        rates = {name.removeprefix("lr/"): v for name, v in values.items() if name.startswith("lr/")}
        record = {"step": done, "stage": self._options.stage}
        record |= {name: values[name] for name in ("loss", "grad_norm", "weight", "skipped")}
        record["loss_mean"] = sum(self._losses) / len(self._losses) if self._losses else None
        record |= {"lr": max(rates.values()), **{f"lr/{group}": rate for group, rate in rates.items()}}
        record |= {
            "tokens_per_s": (window["visual"] + window["text"]) / steps / per_step,
            "mfu": self._flops(window) / steps / per_step / self._peak,
            "data_wait": window["wait"] / steps / per_step,
            "step_s": per_step,
            "eta_s": (self._options.steps - done) * per_step,
        }
        if self._writer is not None:
            self._writer.write(record)
            self._say(metrics.console_line(self._options.stage, self._options.steps, record))
        self._window, self._losses, self._since = collections.Counter(), [], now

    def _report_bad(self, step: int, values: Mapping[str, float]) -> None:
        names = self._sample_keys(step)
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._say(f"step {step + 1}: {what} is not finite: update skipped; samples: {shown}")
        if values["bad_steps"] >= self._options.max_bad_steps:
            raise NonFinite(
                f"{values['bad_steps']} updates in a row were not finite, the last at step {step + 1} ({what}); "
                f"samples of that step: {shown}. Look at them, or lower the learning rate, and run again to go on"
            )


def run_loop(
    step_fn: Step,
    state: State,
    frozen: tree.Tree,
    batches: Batches,
    mesh: Mesh,
    options: LoopOptions,
    recorder: Recorder,
    checkpoints: Checkpoints,
    metadata: Callable[[], Mapping[str, Any]],
) -> State:
    """Trains from ``state["step"]`` to ``options.steps`` and returns the last state, saved.

    Raises Preempted after SIGTERM or SIGINT, NonFinite and DataEnded, all with the state saved.
    """
    start = done = int(state["step"])
    pending: collections.deque[_Pending] = collections.deque()

    def drain(keep: int) -> None:
        while len(pending) > keep:
            recorder.record(pending.popleft())

    def save() -> None:
        checkpoints.save(done, state, metadata())

    stream = batches.iterate(start, jax.process_index(), jax.process_count()) if start < options.steps else iter(())
    with StopSignal() as stop:
        try:
            while done < options.steps:
                before = time.perf_counter()
                if (item := next(stream, None)) is None:
                    drain(0)
                    raise DataEnded(
                        f"the data ends at step {done}, the stage at {options.steps}; saved: "
                        "raise data.epochs (None = for ever) or lower steps, and run again"
                    )
                number, batch = item
                wait = time.perf_counter() - before
                state, values = step_fn(state, frozen, put_batch(batch, mesh))
                pending.append(_Pending(number, values, metrics.count_tokens(batch), wait))
                done = number + 1
                if done == start + 1:
                    drain(0)  # the first step compiles
                    recorder.restart_clock()
                drain(LAG)
                if stop.agreed():
                    drain(0)
                    raise Preempted(f"stopped at step {done} as asked; saved: run the same command again to go on")
                if done % options.checkpoint_every == 0 and done < options.steps:
                    save()
            drain(0)
            if done > start:
                save()
        except (Preempted, NonFinite, DataEnded):
            save()
            raise
        finally:
            getattr(stream, "close", lambda: None)()
            checkpoints.wait()
    return state


def workdir_is_foreign(workdir: Path, known: tuple[str, ...]) -> str | None:
    """The name of a file in ``workdir`` that no run of this project has written, if the folder holds no run at all."""
    if not workdir.exists():
        return None
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
    return None if not names or names & set(known) else min(names)
