"""Traces of the steps of a small program, from the real profiler."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mono_jax.training.callbacks.profiling import SIGNAL, SIGNAL_STEPS, Profiling, may_trace
from mono_jax.training.loop import Progress

STEPS = 12
MULTIPLY = jax.jit(lambda x: {"loss": (x @ x).sum()})


@pytest.fixture(autouse=True)
def profiler():
    if not may_trace():
        pytest.skip("this process has compiled for absent TPUs, after which it cannot be traced")


def run(profiling: Profiling, start: int = 0, asked_at: tuple[int, ...] = ()) -> Progress:
    progress = Progress(None, {}, start, start, STEPS)
    with profiling:
        profiling.begin(progress)
        for progress.done in range(start + 1, STEPS + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=progress.done):
                progress.metrics = MULTIPLY(jnp.ones((8, 8)))
            if progress.done in asked_at:
                os.kill(os.getpid(), SIGNAL)
            profiling.step(progress)
        profiling.finish(progress)
    return progress


def traced(folder: Path) -> dict[str, list[int]]:
    """The steps in the traces below ``folder``, by the name of the folder."""
    found = {}
    for file in folder.rglob("*.xplane.pb"):
        steps = set()
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events if event.name == "train"):
                steps |= {int(value) for name, value in event.stats if name == "step_num"}
        found[file.relative_to(folder).parts[0]] = sorted(steps)
    return found


@pytest.mark.parametrize(
    ("steps", "start", "asked_at", "expected"),
    [
        ((3, 5), 0, (), {"steps-3-5": [3, 4, 5]}),
        ((1, 2), 0, (), {"steps-1-2": [1, 2]}),
        ((3, 7), 4, (), {"steps-5-7": [5, 6, 7]}),  # resumed in the middle
        ((3, 4), 4, (), {}),
        ((11, 40), 0, (), {"steps-11-12": [11, 12]}),
        (None, 0, (), {}),
        (None, 0, (2, 3), {"steps-3-7": [3, 4, 5, 6, 7], "steps-8-12": [8, 9, 10, 11, 12]}),
        ((4, 5), 0, (11,), {"steps-4-5": [4, 5], "steps-12-12": [12]}),
        (None, 0, (12,), {}),
    ],
    ids=str,
)
def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path, steps, start, asked_at, expected):
    said: list[str] = []
    assert run(Profiling(tmp_path, steps, said.append), start, asked_at).done == STEPS
    assert traced(tmp_path) == expected
    assert len(said) == len(expected)
    for name in expected:
        assert any(f"is in {tmp_path / name}: view it with tensorboard --logdir {tmp_path}" in line for line in said)


def test_a_signal_asks_for_five_steps_and_is_not_caught_any_more_afterwards(tmp_path: Path):
    before = signal.getsignal(SIGNAL)
    run(Profiling(tmp_path, None, print))
    assert signal.getsignal(SIGNAL) == before and SIGNAL_STEPS == 5


def test_a_disk_that_is_full_ends_no_run_and_the_next_trace_is_whole(tmp_path: Path):
    """A file size limit stands in for a full disk: writes end in the middle."""
    said: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def say(line: str) -> None:
        said.append(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        assert run(Profiling(tmp_path, (2, 3), say), asked_at=(6,)).done == STEPS
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "profile of the steps 2 to 3 failed" in said[0] and said[0].endswith("training continues")
    assert "\n" not in said[0] and "profile of the steps 7 to 11 is in" in said[1]
    assert traced(tmp_path) == {"steps-7-11": [7, 8, 9, 10, 11]}


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path: Path):
    (tmp_path / "profile").write_text("a file")
    said: list[str] = []
    assert run(Profiling(tmp_path / "profile", (2, 3), said.append), asked_at=(4,)).done == STEPS
    assert len(said) == 2 and all("failed" in line and "Not a directory" in line for line in said)


def test_each_of_several_processes_writes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(Profiling(tmp_path, (2, 2), print))
    assert [file.relative_to(tmp_path).parts[:2] for file in tmp_path.rglob("*.xplane.pb")] == [
        ("steps-2-2", "process-1")
    ]


def test_no_signal_is_caught_outside_the_main_thread(tmp_path: Path):
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(run(Profiling(tmp_path, None, print)).done))
    thread.start()
    thread.join()
    assert done == [STEPS]
