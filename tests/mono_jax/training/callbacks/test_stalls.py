"""A hanging step reports where it hangs, once; work that is always long does not count."""

from __future__ import annotations

import threading

import pytest

from mono_jax.training.callbacks.stalls import FEWEST, Stalls, stacks
from mono_jax.training.loop import Progress


class Run:
    """Quick steps under a watch; ``said``: its lines."""

    def __init__(self, factor: float = 3.0):
        self.said: list[str] = []
        self.spoken = threading.Event()
        self.stalls = Stalls(factor, self._say, shortest=0.2, look_every=0.01)
        self.progress = Progress(None, {}, 0, 0, 1000)
        self.stalls.begin(self.progress)

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.spoken.set()

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.progress.done += 1
            self.stalls.step(self.progress)


def hang_here(event: threading.Event, seconds: float) -> bool:
    return event.wait(seconds)


def test_a_step_that_hangs_shows_every_thread_once():
    run = Run()
    with run.stalls:
        run.steps(FEWEST + 2)
        assert hang_here(run.spoken, 20)
        assert not hang_here(threading.Event(), 0.5) and len(run.said) == 1, "once for each step"
        assert run.said[0].startswith(f"step {FEWEST + 3} has taken")
        assert "in hang_here" in run.said[0] and "in _look_on" in run.said[0]
        run.steps(3)
        run.spoken.clear()
        assert hang_here(run.spoken, 20) and f"step {FEWEST + 6} has taken" in run.said[1]


@pytest.mark.parametrize("activity", ["save", "evaluate"])
def test_time_that_is_long_by_nature_is_no_part_of_a_step(activity: str):
    run = Run()
    with run.stalls:
        run.steps(FEWEST + 2)
        with run.progress.clock.on(activity):
            assert not hang_here(run.spoken, 0.8)
        run.steps()
        assert max(run.stalls._seconds) < 0.5, "nor of the median"
    assert run.said == []


def test_nothing_is_long_before_the_median_is_known_or_after_the_last_step():
    run = Run()
    with run.stalls:
        run.steps(FEWEST)  # the first of which compiles and is left out
        assert not hang_here(run.spoken, 0.6)
        run.steps(FEWEST)
        run.stalls.finish(run.progress)
        assert not hang_here(run.spoken, 0.6)


def test_a_factor_of_zero_looks_at_nothing():
    run = Run(0.0)
    with run.stalls:
        run.steps(FEWEST + 2)
        assert not hang_here(run.spoken, 0.6) and "stalls" not in {thread.name for thread in threading.enumerate()}


def test_stacks_are_those_of_all_threads():
    ended = threading.Event()
    other = threading.Thread(target=hang_here, args=(ended, 20))
    other.start()
    try:
        assert "in hang_here" in stacks()
    finally:
        ended.set()
        other.join()
