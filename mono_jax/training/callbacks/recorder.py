"""Turns the metrics of steps into records and console lines."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mono_jax import tree
from mono_jax.parallel.totals import LAG
from mono_jax.training.callbacks.stopping import NonFinite
from mono_jax.training.clock import Clock
from mono_jax.training.flops import COUNTED, count_tokens
from mono_jax.training.loop import Callback, Progress
from mono_jax.training.metrics import MetricsWriter, Say, console_line, duration
from mono_jax.training.norms import NOT_COMPUTED


@dataclasses.dataclass
class _Pending:
    done: int
    metrics: Mapping[str, jax.Array]
    data_wait: float
    seconds: float = 0.0  # duration of the step; 0 until it is found finished


@dataclasses.dataclass(frozen=True)
class Speed:
    """What throughput is measured against.

    Attributes:
      flops: model FLOPs for the counted tokens.
      peak: peak FLOP/s of all devices; None = unknown, and no MFU is reported.
    """

    flops: Callable[[Mapping[str, float]], float]
    peak: float | None

    def mfu(self, counts: Mapping[str, float], seconds: float) -> float | None:
        """The share of the peak reached by doing the work of ``counts`` in ``seconds``."""
        return None if self.peak is None else self.flops(counts) / seconds / self.peak


class Recorder(Callback):
    """Turns the metrics of steps into records and console lines, and stops a run whose updates stay non-finite.

    Metrics are read ``LAG`` steps late, so that the device always has work queued. Only the first step is waited for,
    to keep its compilation out of the throughput.
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
        alert: Callable[[str, int, str], None] = lambda kind, step, text: None,
    ):
        """``sample_keys``: returns the keys of a step's samples; ``counts``: returns further values for each record,
        e.g. about the data; ``alert`` is called with the kind, step and text of an alert.
        """
        self._stage, self._log_every, self._max_nonfinite_steps = stage, log_every, max_nonfinite_steps
        self._speed, self._sample_keys, self._writer, self._say = speed, sample_keys, writer, say
        self._counts, self._alert = counts, alert
        self._pending: collections.deque[_Pending] = collections.deque()
        self._measured: dict[int, Mapping[str, float]] = {}
        self._seconds: dict[str, float] = {}  # the clock's readings at the last record
        self._began = time.perf_counter()
        self._since = self._began
        self._clear()

    def _clear(self) -> None:
        self._window: collections.Counter[str] = collections.Counter()
        self._losses: list[float] = []  # losses of the steps since the last record
        self._by_source: collections.Counter[str] = collections.Counter()  # sums over these steps

    def facts(self, progress: Progress) -> Mapping[str, int]:
        return count_tokens(progress.batch, progress.counted)

    def step(self, progress: Progress) -> None:
        self._pending.append(_Pending(progress.done, progress.metrics, progress.data_wait))
        self._look()
        if progress.done == progress.start + 1:
            if progress.done < progress.steps:  # otherwise its record waits for the evaluation of the last step
                self._drain(progress, keep=0)
            self._window.clear()
            self._since = time.perf_counter()
            self._say(f"first step after {duration(self._since - self._began)}, compilation included")
        self._drain(progress, keep=LAG)

    def finish(self, progress: Progress) -> None:
        if not isinstance(progress.error, NonFinite):  # later steps in flight would only report the same again
            self._drain(progress, keep=0)

    def add(self, done: int, values: Mapping[str, float], seconds: float) -> None:
        """Puts ``values`` into the record of step ``done``, which is then always written; the evaluation took
        ``seconds``."""
        self._measured[done] = values
        self._since += seconds  # evaluation time is not step time

    def before_save(self, progress: Progress) -> None:
        """Records the pending steps, which a run resumed from this checkpoint would not repeat."""
        self._drain(progress, keep=0)

    def _drain(self, progress: Progress, keep: int) -> None:
        while len(self._pending) > keep:
            self._record(self._pending[0], progress)
            self._pending.popleft()

    def _look(self, read: _Pending | None = None) -> None:
        """Splits the time since the last look that found any among the steps found finished now, including ``read``."""
        new = [each for each in self._pending if not each.seconds and (each is read or each.metrics["loss"].is_ready())]
        if new:
            now = time.perf_counter()
            for pending in new:
                pending.seconds = max(now - self._since, 1e-9) / len(new)
            self._since = now

    def _record(self, pending: _Pending, progress: Progress) -> None:
        with progress.clock.on("wait"):
            values = {name: value.item() for name, value in jax.device_get(dict(pending.metrics)).items()}
            totals = progress.totals.of(pending.done)
        self._look(pending)
        counted = {name: totals[name] for name in COUNTED}
        self._window.update(steps=1, seconds=pending.seconds, wait=pending.data_wait, **counted)
        if values["nonfinite"]:
            self._report_nonfinite(pending.done, values, progress)
        else:
            self._losses.append(values["loss"])
            self._by_source.update({name: v for name, v in values.items() if name.startswith(("loss_sum/", "weight/"))})
        if pending.done % self._log_every == 0 or pending.done == progress.steps or pending.done in self._measured:
            self._log(pending.done, progress, values)

    def _log(self, done: int, progress: Progress, values: Mapping[str, float]) -> None:
        window, count = self._window, self._window["steps"]
        per_step = window["seconds"] / count
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
            "eta_s": (progress.steps - done) * per_step,
        }
        record |= self._losses_by_source()
        record |= {name: value for name, value in values.items() if "_norm/" in name and value != NOT_COMPUTED}
        record |= self._passed(progress.clock)
        record |= device_memory()
        totals = progress.totals.of(done)
        record |= self._counts() | {name: totals[name] for name in ("samples", "bad_samples") if name in totals}
        record |= self._measured.pop(done, {})
        if self._writer is not None:
            self._writer.write(record)
            self._say(console_line(self._stage, progress.steps, record))
        self._clear()

    def _losses_by_source(self) -> dict[str, float | None]:
        """loss/NAME, mean over the trained tokens of the steps since the last record, and weight/NAME, their total
        weight."""
        sums, record = self._by_source, {}
        for source in (name.removeprefix("weight/") for name in sums if name.startswith("weight/")):
            weight = sums[f"weight/{source}"]
            record[f"loss/{source}"] = sums[f"loss_sum/{source}"] / weight if weight else None
            record[f"weight/{source}"] = weight
        return record

    def _passed(self, clock: Clock) -> dict[str, float]:
        """Seconds of each activity since the last record; for the first record, since the process started."""
        before, self._seconds = self._seconds, clock.read()
        return {f"seconds/{name}": value - before.get(name, 0.0) for name, value in self._seconds.items()}

    def _report_nonfinite(self, done: int, values: Mapping[str, float], progress: Progress) -> None:
        keys = self._sample_keys(done - 1)
        shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._say(f"step {done}: {what}: the update is non-finite and is skipped; samples: {shown}")
        self._alert("nonfinite", done, f"step {done}: {what}: the update is non-finite and is skipped")
        if values["nonfinite_steps"] < self._max_nonfinite_steps:
            return
        first = done - int(values["nonfinite_steps"]) + 1
        if ruined := nonfinite_paths(progress.frozen):
            cause = f"frozen weights with non-finite values: {', '.join(ruined[:5])}; use sound initial weights"
        else:
            cause = (
                f"samples of the last step: {shown}. Lower the learning rate, or leave out these steps with "
                f"--config.skip_steps='[[{first},{done}]]', and run again: it resumes before step {first}"
            )
        raise NonFinite(
            f"{done - first + 1} consecutive updates were non-finite, steps {first} to {done} ({what}); {cause}", first
        )


def device_memory() -> dict[str, int]:
    """Bytes in use, and their peak, on the fullest of this process's devices; {} if none reports them (CPUs)."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) for name, key in names.items() if stats and all(key in s for s in stats)}


def nonfinite_paths(params: tree.Tree) -> list[str]:
    """Paths of the arrays that contain a non-finite value."""
    sound = jax.device_get(jax.jit(lambda p: jax.tree.map(lambda a: jnp.isfinite(a).all(), p))(params))
    return [path for path, finite in tree.flatten(sound).items() if not finite]
