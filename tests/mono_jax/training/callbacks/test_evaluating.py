"""When the state is measured, where the values go, and which step is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.training.callbacks import evaluating as module
from mono_jax.training.callbacks.checkpointing import Checkpointing
from mono_jax.training.callbacks.evaluating import Best, Evaluating
from mono_jax.training.loop import Progress, Stopped, after_step
from tests.mono_jax.helpers import random_batch
from tests.mono_jax.training.callbacks.test_checkpointing import state
from tests.mono_jax.training.callbacks.test_recorder import Writer, recorder
from tests.mono_jax.training.callbacks.test_recorder import metrics as metrics_of

STEPS = 7


class Saves:
    """Stands in for ``Checkpoints``: (step, best) of every save."""

    failed = 0

    def __init__(self) -> None:
        self.made: list[tuple[int, int | None]] = []

    def save(self, step: int, state: Any, metadata: Any, *, rotate: bool = True, best: int | None = None) -> None:
        self.made.append((step, best))

    def discard_from(self, step: int) -> None: ...

    def wait(self) -> None: ...


def run(
    values: Sequence[float],
    every: int = 2,
    start: int = 0,
    log_every: int = 3,
    metric: str | None = "heldout/a",
    best: dict[str, Any] | None = None,
    ends: int = STEPS,
) -> tuple[Evaluating, dict[int, Any], Saves]:
    """Seven steps, after which ``values`` are measured one after another; saved after every fifth."""
    writer, left, saves = Writer(), list(values), Saves()
    records = recorder(writer, log_every)
    evaluating = Evaluating(
        every, lambda progress: {"heldout/a": left.pop(0)}, records.add, lambda line: None, metric, best
    )
    saving = Checkpointing(
        saves, 5, lambda step: {}, print, records.before_save, best=lambda: evaluating.best and evaluating.best.step
    )
    progress = Progress(state(start), {}, start, start, STEPS)
    progress.batch = random_batch(2)
    for done in range(start + 1, ends + 1):
        progress.done, progress.state, progress.metrics = done, state(done), metrics_of(done)
        after_step(progress, (evaluating, records, saving))
    progress.error = None if ends == STEPS else Stopped("asked")
    for callback in (evaluating, records, saving):
        callback.finish(progress)
    assert not left
    return evaluating, {record["step"]: record.get("heldout/a") for record in writer}, saves


def test_values_go_into_the_records_of_their_steps_and_the_last_step_is_measured():
    evaluating, found, _ = run([3.0, 1.0, 2.0, 4.0])
    assert found == {2: 3.0, 3: None, 4: 1.0, 6: 2.0, 7: 4.0}
    assert evaluating.best == Best("heldout/a", 4, 1.0)


@pytest.mark.parametrize(("start", "measured"), [(1, 3), (2, 2), (3, 2), (5, 1)])
def test_a_first_step_after_resuming_is_measured_too(start: int, measured: int):
    values = [3.0, 1.0, 2.0, 4.0][-(measured + 1) :]
    _, found, _ = run(values, start=start)
    steps = [step for step in (2, 4, 6) if step > start]
    assert [found[step] for step in (*steps, 7)] == values


@pytest.mark.parametrize(("every", "steps"), [(7, [7]), (9, [7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_each_step_is_measured_once(every: int, steps: list[int]):
    _, found, _ = run([float(step) for step in steps], every=every)
    assert [step for step, value in found.items() if value is not None] == steps


def test_a_run_that_is_stopped_is_not_measured_again():
    _, found, _ = run([3.0, 1.0], ends=5)
    assert found == {2: 3.0, 3: None, 4: 1.0}


def test_the_best_is_saved_at_once_and_named_in_later_saves():
    _, _, saves = run([3.0, 1.0, 2.0, 0.5])
    assert saves.made == [(2, 2), (4, 4), (5, 4), (7, 7)]
    _, _, saves = run([3.0, 3.0, 2.0, 4.0], every=2)
    assert saves.made == [(2, 2), (5, 2), (6, 6), (7, 6)]


def test_values_that_are_not_finite_are_never_the_best():
    evaluating, found, saves = run([math.nan, math.inf, -1.0, math.nan])
    assert evaluating.best == Best("heldout/a", 6, -1.0) and math.isnan(found[2])
    assert saves.made == [(5, None), (6, 6), (7, 6)]


def test_without_a_metric_nothing_is_the_best():
    evaluating, found, saves = run([3.0, 1.0, 2.0, 4.0], metric=None)
    assert evaluating.best is None and found[4] == 1.0 and saves.made == [(5, None), (7, None)]


def test_the_best_is_known_after_resuming_unless_another_metric_decides():
    known = {"metric": "heldout/a", "step": 3, "value": 1.5}
    evaluating, _, saves = run([2.0, 3.0], start=4, best=known)
    assert evaluating.best == Best(**known) and saves.made == [(5, 3), (7, 3)]
    evaluating, _, _ = run([2.0, 3.0], start=4, best=known | {"metric": "heldout/b"})
    assert evaluating.best == Best("heldout/a", 6, 2.0)


def test_the_time_that_measuring_takes_is_no_time_of_the_steps(monkeypatch: pytest.MonkeyPatch):
    """A clock that only evaluations advance: a step takes no time, an evaluation 100 seconds."""
    clock, said, writer = [0.0], [], Writer()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    records = recorder(writer, 2)

    def measure(progress: Progress) -> dict[str, float]:
        clock[0] += 100.0
        return {"heldout/a": 1.0}

    evaluating = Evaluating(3, measure, records.add, said.append)
    progress = Progress(state(0), {}, 0, 0, STEPS, batch=random_batch(2))
    for done in range(1, STEPS + 1):
        progress.done, progress.state, progress.metrics = done, state(done), metrics_of(done)
        after_step(progress, [evaluating, records])
    for callback in (evaluating, records):
        callback.finish(progress)
    assert [(record["step"], record["step_s"] < 1e-6) for record in writer] == [(n, True) for n in (2, 3, 4, 6, 7)]
    assert said == [f"step {step}: heldout/a 1.0000 (in 1m40s)" for step in (3, 6, 7)]


@pytest.mark.parametrize(("lower", "best"), [(True, Best("a", 4, 1.0)), (False, Best("a", 2, 3.0))])
def test_the_best_may_be_the_highest(lower: bool, best: Best):
    left = [3.0, 1.0, math.nan, 3.0, 1.0]
    evaluating = Evaluating(2, lambda p: {"a": left.pop(0)}, lambda *of_step: None, print, "a", lower_is_better=lower)
    for done in (2, 4, 6, 8, 10):
        evaluating.step(Progress(state(done), {}, 0, done, STEPS))
    assert evaluating.best == best


def test_the_best_must_be_measured():
    evaluating = Evaluating(2, lambda p: {"heldout/a": 1.0}, lambda *of_step: None, print, "heldout/b")
    with pytest.raises(ConfigError, match=r"keep_best.*heldout/b.*did you mean.*heldout/a"):
        evaluating.step(Progress(state(2), {}, 0, 2, STEPS))
