"""When states are saved: with a saver that writes down what was asked of it."""

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
    """Stands in for ``Checkpoints``: what was asked of it, in order."""

    def __init__(self, fails: tuple[int, ...] = ()):
        self.asked: list[tuple[Any, ...]] = []
        self._fails, self.failed = fails, 0

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], *, rotate: bool = True, best: int | None = None
    ) -> None:
        if step in self._fails:
            self.failed += 1
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
    assert sum(f"failed saves so far: {saver.failed}); training continues" in line for line in said) == len(fails)
    unsaved = [step for step in bad if step % every == 0 and step < STEPS]
    assert [line for line in said if "is not saved" in line] == [
        f"step {step} is not saved: its update was not finite" for step in unsaved
    ]
    assert callback.skipped == len(unsaved)


def test_a_state_of_which_a_failed_step_has_consumed_a_part_is_not_saved():
    saver, said = Saver(), []
    consumed = TrainState(jnp.int32(4), jnp.int32(0), jnp.int32(0), {"kept": jnp.ones(2), "gone": jnp.ones(3)}, {})
    consumed.trainable["gone"].delete()
    progress = Progress(consumed, {}, 0, 4, STEPS, error=RuntimeError("out of memory"))
    Checkpointing(saver, 3, dict, said.append).finish(progress)
    assert saver.asked == [("wait",)]
    assert said == ["the state of step 4 is lost in the failed step: the newest checkpoint stands"]
