"""How metrics of steps are recorded, without a model: with arrays made up here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.parallel.totals import LAG
from mono_jax.training.callbacks import recorder as module
from mono_jax.training.callbacks.recorder import Recorder, Speed, nonfinite_paths
from mono_jax.training.callbacks.stopping import NonFinite
from mono_jax.training.loop import Progress, Stopped, after_step
from tests.mono_jax.helpers import SPEC, random_batch

STEPS = 7
TOKENS = 2 * SPEC.visual_tokens + 2 * (SPEC.text_tokens - 2)  # of a batch of two rows


class Writer(list):
    """Stands in for ``MetricsWriter``."""

    write = list.append


def metrics(step: int, bad: tuple[int, ...] = ()) -> Mapping[str, Any]:
    """Every value tells its step."""
    run = 0
    while step - run in bad:
        run += 1
    values = {"loss": np.nan if run else 10.0 * step, "grad_norm": step + 0.5, "weight": 100.0 + step}
    values |= {"nonfinite": int(run > 0), "nonfinite_steps": run, "skipped": sum(number <= step for number in bad)}
    return {name: jnp.asarray(value) for name, value in (values | {"lr/a": 0.1 * step, "lr/b": 0.01 * step}).items()}


def recorder(writer: Writer, log_every: int, say: Callable[[str], None] = print, most: int = 10) -> Recorder:
    speed = Speed(lambda counts: counts["visual"] + counts["text"], 50.0)
    return Recorder("S1.1", log_every, most, speed, lambda step: [f"key {step}"], writer, say)


def run(
    callback: Recorder, bad: tuple[int, ...] = (), start: int = 0, frozen: Mapping[str, Any] | None = None
) -> Progress:
    progress = Progress(None, frozen or {}, start, start, STEPS, batch=random_batch(2), data_wait=0.25)
    try:
        for done in range(start + 1, STEPS + 1):
            progress.done, progress.metrics = done, metrics(done, bad)
            after_step(progress, [callback])
    except Stopped as error:
        progress.error = error
    callback.finish(progress)
    return progress


@pytest.mark.parametrize(("start", "log_every", "logged"), [(0, 3, [3, 6, 7]), (0, 1, [*range(1, 8)]), (4, 2, [6, 7])])
def test_every_record_holds_the_values_of_its_own_step(start: int, log_every: int, logged: list[int]):
    records = Writer()
    run(recorder(records, log_every), start=start)
    assert [record["step"] for record in records] == logged
    for record in records:
        step = record["step"]
        assert record["loss"] == 10 * step and record["grad_norm"] == step + 0.5 and record["weight"] == 100 + step
        assert record["lr/a"] == record["lr"] == pytest.approx(0.1 * step)
        assert record["lr/b"] == pytest.approx(0.01 * step)
        since = max([start, *(earlier for earlier in logged if earlier < step)])
        assert record["loss_mean"] == pytest.approx(np.mean([10 * number for number in range(since + 1, step + 1)]))


def test_rates_are_those_of_the_steps_since_the_last_record(monkeypatch: pytest.MonkeyPatch):
    """A clock that advances two seconds per reading: at the start, after step 1, and when a step is found finished."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    records = Writer()
    run(recorder(records, 3))
    assert [record["step_s"] for record in records] == pytest.approx([2, 2, 2])  # except the first step
    for record in records:
        rate = TOKENS / record["step_s"]
        assert record["tokens_per_s"] == pytest.approx(rate) and record["mfu"] == pytest.approx(rate / 50)
        assert record["data_wait"] == pytest.approx(0.25 / record["step_s"])
        assert record["eta_s"] == pytest.approx((STEPS - record["step"]) * record["step_s"])


class Late:
    """A value that the device has finished when the ``clock`` shows ``at``; reading it waits until then."""

    def __init__(self, value: float, at: float, clock: list[float]):
        self._value, self._at, self._clock = value, at, clock

    def is_ready(self) -> bool:
        return self._clock[0] >= self._at

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._clock[0] = max(self._clock[0], self._at)
        return np.asarray(self._value, dtype)


@pytest.mark.parametrize("host", [3.0, 0.25])
def test_each_record_has_the_time_of_its_own_step(monkeypatch: pytest.MonkeyPatch, host: float):
    """Steps of three seconds, whether ``host`` seconds go by until the next or the host is ahead of the device; also
    those recorded at once for a save, of which all but the first would otherwise be steps of no time."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback = recorder(records, 1)
    for done in range(1, STEPS):
        now[0] += host
        progress.done, progress.metrics = done, {**metrics(done), "loss": Late(10.0 * done, 3.0 * done, now)}
        after_step(progress, [callback])
        if done == 4:
            callback.before_save(progress)
    callback.finish(progress)
    assert [record["step_s"] for record in records] == pytest.approx([3.0] * (STEPS - 1))
    assert [record["tokens_per_s"] for record in records] == pytest.approx([TOKENS / 3.0] * (STEPS - 1))


def test_every_step_is_recorded_before_a_save():
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback = recorder(records, 1)
    for done in range(1, STEPS):
        progress.done, progress.metrics = done, metrics(done)
        after_step(progress, [callback])
        callback.before_save(progress)
        assert [record["step"] for record in records] == list(range(1, done + 1))


def test_metrics_are_read_late_but_for_the_first_step():
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback, seen = recorder(records, 1), []
    for done in range(1, STEPS):
        progress.done, progress.metrics = done, metrics(done)
        after_step(progress, [callback])
        seen.append(len(records))
    assert seen == [1, *(max(1, done - LAG) for done in range(2, STEPS))]


def test_updates_that_are_not_finite_are_named_and_kept_out_of_the_mean():
    records, said = Writer(), []
    progress = run(recorder(records, 7, said.append), bad=(2, 5, 6))
    assert progress.error is None
    assert records[0]["loss_mean"] == pytest.approx(np.mean([10, 30, 40, 70])) and records[0]["skipped"] == 3
    named = [line for line in said if "non-finite" in line]
    assert [line.split(":")[0] for line in named] == ["step 2", "step 5", "step 6"]
    assert [line.split("samples: ")[1] for line in named] == ["key 1", "key 4", "key 5"]


@pytest.mark.parametrize(("most", "bad", "stops"), [(2, (3, 4), True), (3, (3, 4), False), (2, (3, 5), False)])
def test_too_many_updates_in_a_row_that_are_not_finite_end_the_run(most: int, bad: tuple[int, ...], stops: bool):
    progress = run(recorder(Writer(), 1, lambda line: None, most), bad=bad)
    assert isinstance(progress.error, NonFinite) == stops
    if stops:
        assert progress.error.first == 3
        assert "2 consecutive updates were non-finite, steps 3 to 4" in str(progress.error)
        assert "samples of the last step: key 3." in str(progress.error)


def test_frozen_weights_that_are_not_finite_are_named_in_place_of_samples():
    good, bad = jnp.ones(3), jnp.asarray([0.0, jnp.inf])
    assert nonfinite_paths({"a": {"b": good, "c": bad}, "d": bad * 0}) == ["a/c", "d"]
    progress = run(recorder(Writer(), 1, lambda line: None, 1), bad=(3,), frozen={"a": {"b": good, "c": bad}})
    assert "frozen weights with non-finite values: a/c;" in str(progress.error) and "key" not in str(progress.error)


def test_at_most_twenty_samples_are_named():
    said: list[str] = []
    speed = Speed(lambda counts: 1.0, 1.0)
    for count, end in ((20, "key 19"), (21, "key 19 and 1 more")):
        said.clear()
        keys = [f"key {number}" for number in range(count)]
        run(Recorder("S1.1", 100, 10, speed, lambda step, keys=keys: keys, None, said.append), bad=(2,))
        [line] = [line for line in said if "non-finite" in line]
        assert line.endswith(end)


class Device:
    """Stands in for a device whose allocator reports its allocations."""

    def __init__(self, **stats: int):
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats or None


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Device(bytes_in_use=5, peak_bytes_in_use=8), Device(bytes_in_use=6, peak_bytes_in_use=7)], (6, 8)),
        ([Device(bytes_in_use=5)], (5, None)),
        ([Device(), Device()], (None, None)),
        (jax.local_devices()[:1], (None, None)),  # a real CPU
    ],
)
def test_memory_is_that_of_the_fullest_device_where_they_tell(
    devices: list[Any], expected: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    records = Writer()
    run(recorder(records, 7))
    assert tuple(records[0].get(name) for name in ("memory_bytes", "memory_peak_bytes")) == expected


def test_norms_of_groups_are_recorded_where_they_were_computed():
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback = recorder(records, 1)
    for progress.done, norm in ((1, -1.0), (2, 3.0), (3, np.nan)):
        progress.metrics = {**metrics(progress.done), "update_norm/a": jnp.float32(norm)}
        after_step(progress, [callback])
    callback.finish(progress)
    assert [record.get("update_norm/a", "absent") for record in records][:2] == ["absent", 3.0]
    assert np.isnan(records[2]["update_norm/a"])


def test_losses_per_source_are_means_over_the_steps_of_the_record():
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback = recorder(records, 2)
    for progress.done in range(1, 5):
        sums = {"loss_sum/a": 6.0 * progress.done, "weight/a": 2.0, "loss_sum/b": 0.0, "weight/b": 0.0}
        progress.metrics = metrics(progress.done) | {name: jnp.float32(value) for name, value in sums.items()}
        after_step(progress, [callback])
    callback.finish(progress)
    assert [record["loss/a"] for record in records] == [4.5, 10.5]
    assert [record["weight/a"] for record in records] == [4, 4]
    assert all(record["loss/b"] is None and record["weight/b"] == 0 for record in records)


def test_seconds_of_activities_are_those_since_the_last_record():
    class Clock:
        reads = iter(({"step": 3.0}, {"step": 5.0, "save": 1.5}))

        def read(self) -> dict[str, float]:
            return next(self.reads)

    callback, clock = recorder(Writer(), 1), Clock()
    assert callback._passed(clock) == {"seconds/step": 3.0}
    assert callback._passed(clock) == {"seconds/step": 2.0, "seconds/save": 1.5}
