"""What becomes of the metrics of steps, without a model: arrays made up here."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.loading.report import Report
from mono_jax.errors import CheckpointError
from mono_jax.training import callbacks
from mono_jax.training.callbacks import (
    LAG,
    BadSampleLimit,
    Checkpointing,
    NonFinite,
    Recorder,
    Speed,
    TooManyBadSamples,
)
from mono_jax.training.loop import Progress, Stopped
from mono_jax.training.state import TrainState
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
    callback: callbacks.Callback, bad: tuple[int, ...] = (), start: int = 0, frozen: Mapping[str, Any] | None = None
) -> Progress:
    progress = Progress(None, frozen or {}, start, start, STEPS, batch=random_batch(2), data_wait=0.25)
    try:
        for done in range(start + 1, STEPS + 1):
            progress.done, progress.metrics = done, metrics(done, bad)
            callback.step(progress)
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
    """A clock of two seconds a look: it is looked at when made, after the first step and at each record."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(clock)))
    records = Writer()
    run(recorder(records, 3))
    assert [record["step_s"] for record in records] == pytest.approx([2 / 2, 2 / 3, 2 / 1])  # the first step aside
    for record in records:
        rate = TOKENS / record["step_s"]
        assert record["tokens_per_s"] == pytest.approx(rate) and record["mfu"] == pytest.approx(rate / 50)
        assert record["data_wait"] == pytest.approx(0.25 / record["step_s"])
        assert record["eta_s"] == pytest.approx((STEPS - record["step"]) * record["step_s"])


def test_metrics_are_read_late_but_for_the_first_step():
    records, progress = Writer(), Progress(None, {}, 0, 0, STEPS, batch=random_batch(2))
    callback, seen = recorder(records, 1), []
    for done in range(1, STEPS):
        progress.done, progress.metrics = done, metrics(done)
        callback.step(progress)
        seen.append(len(records))
    assert seen == [1, *(max(1, done - LAG) for done in range(2, STEPS))]


def test_updates_that_are_not_finite_are_named_and_kept_out_of_the_mean():
    records, said = Writer(), []
    progress = run(recorder(records, 7, said.append), bad=(2, 5, 6))
    assert progress.error is None
    assert records[0]["loss_mean"] == pytest.approx(np.mean([10, 30, 40, 70])) and records[0]["skipped"] == 3
    named = [line for line in said if "not finite" in line]
    assert [line.split(":")[0] for line in named] == ["step 2", "step 5", "step 6"]
    assert [line.split("samples: ")[1] for line in named] == ["key 1", "key 4", "key 5"]


@pytest.mark.parametrize(("most", "bad", "stops"), [(2, (3, 4), True), (3, (3, 4), False), (2, (3, 5), False)])
def test_too_many_updates_in_a_row_that_are_not_finite_end_the_run(most: int, bad: tuple[int, ...], stops: bool):
    progress = run(recorder(Writer(), 1, lambda line: None, most), bad=bad)
    assert isinstance(progress.error, NonFinite) == stops
    if stops:
        assert progress.error.first == 3
        assert "2 updates in a row were not finite, steps 3 to 4" in str(progress.error)
        assert "samples of the last step: key 3." in str(progress.error)


def test_frozen_weights_that_are_not_finite_are_named_in_place_of_samples():
    good, bad = jnp.ones(3), jnp.asarray([0.0, jnp.inf])
    assert callbacks.nonfinite_paths({"a": {"b": good, "c": bad}, "d": bad * 0}) == ["a/c", "d"]
    progress = run(recorder(Writer(), 1, lambda line: None, 1), bad=(3,), frozen={"a": {"b": good, "c": bad}})
    assert "frozen weights that are not finite: a/c;" in str(progress.error) and "key" not in str(progress.error)


def state(done: int, nonfinite: int = 0) -> TrainState:
    return TrainState(jnp.int32(done), jnp.int32(nonfinite), jnp.int32(0), {}, {})


class Saver:
    """Stands in for ``Checkpoints``: what was asked of it, in order."""

    def __init__(self, fails: tuple[int, ...] = ()):
        self.asked: list[tuple[Any, ...]] = []
        self._fails = fails

    def save(self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True) -> None:
        if step in self._fails:
            raise CheckpointError("disk full")
        assert int(state["step"]) == step
        self.asked.append((step, metadata["made"], rotate))

    def discard_from(self, step: int) -> None:
        self.asked.append(("discard", step))

    def wait(self) -> None:
        self.asked.append(("wait",))


@pytest.mark.parametrize(
    ("start", "every", "bad", "fails", "error", "asked"),
    [
        (0, 3, (), (), None, [(3, 0, True), (6, 1, True), (7, 2, True)]),
        (0, 7, (), (), None, [(7, 0, True)]),
        (0, 1, (), (), None, [(step, step - 1, True) for step in range(1, 8)]),
        (7, 3, (), (), None, []),  # nothing left to do
        (7, 3, (), (), Stopped("x"), [(7, 0, True)]),
        (0, 3, (6,), (), None, [(3, 0, True), (7, 1, True)]),  # not in a streak
        (0, 3, (7,), (), None, [(3, 0, True), (6, 1, True), (7, 2, False)]),  # the last, but beside older ones
        (0, 3, (), (3,), None, [(6, 0, True), (7, 1, True)]),
        (0, 3, (), (), NonFinite("x", 5), [(3, 0, True), (6, 1, True), ("discard", 5)]),
    ],
    ids=str,
)
def test_states_are_saved_at_every_so_many_steps_and_at_the_end(start, every, bad, fails, error, asked):
    saver, said, before = Saver(fails), [], []
    metadata = lambda: {"made": len(saver.asked)}  # noqa: E731
    callback = Checkpointing(saver, every, metadata, said.append, lambda progress: before.append(progress.done))
    progress = Progress(state(start), {}, start, start, STEPS)
    for done in range(start + 1, STEPS + 1):
        progress.done, progress.state = done, state(done, done in bad)
        if done % callback.every == 0:
            callback.step(progress)
    progress.error = error
    callback.finish(progress)
    assert saver.asked == [*asked, ("wait",)]
    assert before == [step for step in range(start + 1, STEPS) if step % every == 0]
    assert callback.failed == len(fails) and sum("training continues" in line for line in said) == len(fails)
    assert [line for line in said if "is not saved" in line] == [
        f"step {step} is not saved: its update was not finite" for step in bad if step % every == 0 and step < STEPS
    ]


@pytest.mark.parametrize(("share", "stops"), [(0.0, False), (0.1, False), (0.101, True)])
def test_a_share_of_bad_samples_above_the_limit_ends_the_run(share: float, stops: bool):
    report = Report(skipped=collections.Counter(no_image=3, too_long=5))
    report.bad_share = lambda: share
    progress = run(BadSampleLimit(report, 0.1))
    assert isinstance(progress.error, TooManyBadSamples) == stops and progress.done == (1 if stops else STEPS)
    if stops:
        assert "10.1% of the last samples are bad, more than the limit of 10.0% (too_long 5, no_image 3 in all)" in str(
            progress.error
        )


def test_at_most_twenty_samples_are_named():
    said: list[str] = []
    speed = Speed(lambda counts: 1.0, 1.0)
    for count, end in ((20, "key 19"), (21, "key 19 and 1 more")):
        said.clear()
        keys = [f"key {number}" for number in range(count)]
        run(Recorder("S1.1", 100, 10, speed, lambda step, keys=keys: keys, None, said.append), bad=(2,))
        [line] = [line for line in said if "not finite" in line]
        assert line.endswith(end)


def test_the_exit_code_of_a_run_that_was_asked_to_stop():
    """Launchers rely on it: EX_TEMPFAIL of sysexits.h."""
    assert callbacks.PREEMPTED == 75
