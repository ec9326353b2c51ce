"""Every moment belongs to one activity."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mono_jax.training.clock import ACTIVITIES, Clock, table
from mono_jax.training.loop import Progress
from mono_jax.training.timeline import Timeline


class Time:
    """A clock that is set manually."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def spent(clock: Clock) -> dict[str, float]:
    return {name: pytest.approx(value) for name, value in clock.read().items() if value}


def test_an_inner_activity_takes_its_time_from_the_outer_one():
    time = Time()
    clock = Clock("start", time)
    time.pass_(1)
    clock.switch("other")
    with clock.on("save"):
        time.pass_(2)
        with contextlib.suppress(ValueError), clock.on("wait"):
            time.pass_(4)
            raise ValueError
        time.pass_(8)
    time.pass_(16)
    assert spent(clock) == {"start": 1, "save": 10, "wait": 4, "other": 16}


@pytest.mark.parametrize("seed", range(5))
def test_activities_sum_to_the_time_that_passed(seed: int):
    time, rng = Time(), random.Random(seed)
    clock = Clock("start", time)

    def nest(depth: int) -> None:
        for _ in range(3):
            time.pass_(rng.random())
            clock._event("/jax/core/compile/backend_compile_duration", rng.random())
            with clock.on(rng.choice(list(ACTIVITIES))):
                time.pass_(rng.random())
                clock._event("/jax/core/compile/jaxpr_trace_duration", rng.random())
                if depth:
                    nest(depth - 1)
            assert sum(clock.read().values()) == pytest.approx(time.now - 100)

    nest(3)
    assert min(clock.read().values()) >= 0


def test_compilation_is_taken_away_from_where_it_happened_and_counted_once():
    time = Time()
    clock = Clock("other", time)
    with clock.on("dispatch"):
        time.pass_(10)
        clock._event("/jax/core/compile/jaxpr_trace_duration", 1)
        time.pass_(1)
        clock._event("/jax/core/compile/jaxpr_trace_duration", 3)  # encloses the first
        time.pass_(4)
        clock._event("/jax/core/compile/backend_compile_duration", 2)
        clock._event("/jax/checkpoint/write/sync_duration", 5)
    assert spent(clock) == {"dispatch": 10, "compile": 5}


def test_what_jax_compiles_is_noticed_while_the_clock_is_entered():
    def compile_anew(factor: float) -> None:
        jax.jit(lambda x: x * factor).lower(jnp.ones(3)).compile()

    with Clock() as clock:
        assert clock.read()["compile"] == 0
        with clock.on("data"):
            compile_anew(2.5)
        compiled = clock.read()["compile"]
        assert compiled > 0
    compile_anew(3.5)
    assert clock.read()["compile"] == compiled


def test_the_table_has_the_share_of_each_activity_and_the_sum():
    lines = table({"data": 1.0, "wait": 3.0, "save": 0.0})
    assert [line.split()[:4] for line in lines] == [
        ["data", "1.00", "s", "25.0%"],
        ["wait", "3.00", "s", "75.0%"],
        ["total", "4.00", "s", "100.0%"],
    ]


def test_the_timeline_is_only_added_to(tmp_path: Path):
    def process(start: int, end: int) -> list[str]:
        time = Time()
        timeline = Timeline(tmp_path / "timeline.jsonl", Clock("start", time), print, every=2)
        progress = Progress(None, {}, start, start, 8)
        time.pass_(1.5)
        timeline.begin(progress)
        for progress.done in range(start + 1, end + 1):
            with timeline.clock.on("wait"):
                time.pass_(0.25)
            if progress.done % timeline.every == 0:
                timeline.step(progress)
        timeline.finish(progress)
        return timeline.close()

    assert process(0, 5)[-1].split()[:2] == ["total", "2.75"]
    process(4, 5)
    entries = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"], e["seconds"]) for e in entries] == [
        ("start", 0, {"start": 1.5}),
        ("step", 2, {"wait": 0.5}),
        ("step", 4, {"wait": 0.5}),
        ("end", 5, {"wait": 0.25}),
        ("start", 4, {"start": 1.5}),
        ("end", 5, {"wait": 0.25}),
    ]


def test_a_process_that_does_not_come_to_training_leaves_no_line(tmp_path: Path):
    assert Timeline(tmp_path / "timeline.jsonl", Clock(), print).close() == []
    assert not list(tmp_path.iterdir())
