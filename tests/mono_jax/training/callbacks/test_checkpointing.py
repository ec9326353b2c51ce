"""When states are saved, with a saver that records its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import pytest

from mono_jax.errors import CheckpointError
from mono_jax.training.callbacks.checkpointing import Checkpointing
from mono_jax.training.callbacks.stopping import NonFinite
from mono_jax.training.loop import Progress, Stopped
from mono_jax.training.state import TrainState

STEPS = 7


def state(done: int, nonfinite: int = 0) -> TrainState:
    return TrainState(jnp.int32(done), jnp.int32(nonfinite), jnp.int32(0), {}, {})


class Saver:
    """Stands in for ``Checkpoints`` and records its calls, in order."""

    def __init__(self, fails: tuple[int, ...] = ()):
        self.asked: list[tuple[Any, ...]] = []
        self._fails, self.failed = fails, 0

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True, best: int | None = None
    ) -> bool:
        if step in self._fails:
            self.failed += 1
            raise CheckpointError("disk full")
        assert int(state["step"]) == step
        self.asked.append((step, metadata["made"], rotate))
        return True

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
        (0, 3, (7,), (), None, [(3, 0, True), (6, 1, True), (7, 2, False)]),  # the last, but with older ones
        (0, 3, (), (3,), None, [(6, 0, True), (7, 1, True)]),
        (0, 3, (), (), NonFinite("x", 5), [(3, 0, True), (6, 1, True), ("discard", 5)]),
    ],
    ids=str,
)
def test_states_are_saved_at_every_so_many_steps_and_at_the_end(start, every, bad, fails, error, asked):
    saver, said, before = Saver(fails), [], []
    metadata = lambda step: {"made": len(saver.asked)}  # noqa: E731
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
    assert sum(f"failed saves so far: {saver.failed}); training continues" in line for line in said) == len(fails)
    unsaved = [step for step in bad if step % every == 0 and step < STEPS]
    assert [line for line in said if "is not saved" in line] == [
        f"step {step} is not saved: its update was non-finite" for step in unsaved
    ]
    assert callback.skipped == len(unsaved)


def test_a_state_of_which_a_failed_step_has_consumed_a_part_is_not_saved():
    saver, said = Saver(), []
    consumed = TrainState(jnp.int32(4), jnp.int32(0), jnp.int32(0), {"kept": jnp.ones(2), "gone": jnp.ones(3)}, {})
    consumed.trainable["gone"].delete()
    progress = Progress(consumed, {}, 0, 4, STEPS, error=RuntimeError("out of memory"))
    Checkpointing(saver, 3, lambda step: {}, said.append).finish(progress)
    assert saver.asked == [("wait",)]
    assert said == ["the state of step 4 was lost in the failed step; the newest checkpoint remains"]


class Late:
    """The sums of ``Totals`` over two processes, of which the other adds nothing, read ``lag`` steps late."""

    def __init__(self, lag: int):
        self.lag, self._facts = lag, {}

    def add(self, step: int, facts: Mapping[str, int]) -> None:
        self._facts[step] = facts

    def latest(self, step: int) -> Mapping[str, int]:
        return self._facts.get(step - self.lag, {})


def play(seconds: list[float], lag: int, minutes: float | None, every: int = 1000) -> tuple[list[list[int]], list[Any]]:
    """Steps saved by the first process and by another one, when steps take ``seconds``; what the first recorded."""
    saved, records, clock = [], [], [0.0]
    savers, totals = [Saver(), Saver()], Late(lag)
    callbacks = [
        Checkpointing(
            saver, every, lambda step: {"made": 0}, lambda line: None, minutes=minutes, now=lambda: clock[0],
            record=lambda *facts, who=who: records.append(facts) if who == 0 else None,
        )
        for who, saver in enumerate(savers)
    ]  # fmt: skip
    progress = Progress(state(0), {}, 0, 0, len(seconds) + 1, totals=totals)
    for callback in callbacks:
        callback.begin(progress)
    for done, passed in enumerate(seconds, 1):
        progress.done, progress.state = done, state(done)
        clock[0] += passed
        totals.add(done, callbacks[0].facts(progress))  # of the other one: 0, see the test of facts
        for callback in callbacks:
            callback.step(progress)
    saved = [[step for step, *_ in saver.asked] for saver in savers]
    return saved, records


@pytest.mark.parametrize(
    ("seconds", "lag", "minutes", "every", "expected"),
    [
        ([10.0] * 20, 0, 1.0, 1000, [6, 12, 18]),
        ([10.0] * 20, 2, 1.0, 1000, [8, 16]),  # known two steps later, counted from the save
        ([10.0] * 20, 0, 1.0, 5, [5, 10, 15, 20]),  # saves at steps count, too
        ([10.0] * 12, 2, 1.0, 7, [7]),  # called at step 6, saved at 7 anyway
        ([90.0] * 5, 0, 1.0, 1000, [1, 2, 3, 4, 5]),  # steps longer than that
        ([90.0] * 7, 2, 1.0, 1000, [3, 6]),
        ([1.0, 300.0, 1.0, 1.0, 1.0], 2, 1.0, 1000, [4]),
        ([10.0] * 20, 2, None, 8, [8, 16]),
    ],
)
def test_states_are_saved_every_so_many_minutes_alike_by_all(seconds, lag, minutes, every, expected):
    saved, records = play(seconds, lag, minutes, every)
    assert saved == [expected, expected]
    assert [step for step, *_ in records] == expected
    assert all(size == 3 * 4 and waited >= 0 for _, size, waited in records)  # three counters of 32 bits


def test_one_process_decides_by_its_clock(monkeypatch: pytest.MonkeyPatch):
    def facts(process: int) -> Mapping[str, int]:
        monkeypatch.setattr("jax.process_index", lambda: process)
        clock = iter([0.0, 0.0, 61.0, 61.0])
        callback = Checkpointing(Saver(), 9, dict, print, minutes=1.0, now=lambda: next(clock))
        callback.begin(Progress(state(0), {}, 0, 0, 9))
        return callback.facts(Progress(state(1), {}, 0, 1, 9))

    assert (facts(0), facts(1)) == ({"save_now": 1}, {"save_now": 0})
    assert Checkpointing(Saver(), 9, dict, print).facts(Progress(state(1), {}, 0, 1, 9)) == {}
