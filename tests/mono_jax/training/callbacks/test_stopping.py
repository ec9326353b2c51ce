"""What ends a run early."""

from __future__ import annotations

import collections
import fcntl
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.loading.report import Report
from mono_jax.training.callbacks import stopping
from mono_jax.training.callbacks.stopping import (
    BadSampleLimit,
    Preempted,
    StopAtOnce,
    StopWhenAsked,
    TooManyBadSamples,
)
from mono_jax.training.loop import Progress


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (100, False), (101, True)])
def test_a_share_of_bad_samples_above_the_limit_ends_the_run(bad: int, stops: bool):
    report = Report(skipped=collections.Counter(no_image=3, too_long=5))
    report.recent = lambda: (1000, bad)
    limit, progress = BadSampleLimit(report, 0.1), Progress(None, {}, 0, 1, 7)
    progress.totals.add(1, limit.facts(progress))
    if not stops:
        return limit.step(progress)
    said = r"10\.1% of the last samples are bad, more than the limit of 10\.0% \(too_long 5, no_image 3 in total\)"
    with pytest.raises(TooManyBadSamples, match=said):
        limit.step(progress)


def test_before_the_first_sum_nothing_is_bad():
    BadSampleLimit(Report(), 0.0).step(Progress(None, {}, 0, 1, 7))


def test_the_commonest_five_reasons_are_named():
    report = Report(skipped=collections.Counter({f"reason{number}": number for number in range(1, 8)}))
    report.recent = lambda: (1000, 500)
    limit, progress = BadSampleLimit(report, 0.1), Progress(None, {}, 0, 1, 7)
    progress.totals.add(1, limit.facts(progress))
    with pytest.raises(TooManyBadSamples, match=r"\(reason7 7, reason6 6, reason5 5, reason4 4, reason3 3 in total\)"):
        limit.step(progress)


def test_the_exit_code_of_a_run_that_was_asked_to_stop():
    """Launchers rely on it: EX_TEMPFAIL of sysexits.h."""
    assert stopping.PREEMPTED == 75


def test_a_command_stops_at_once_except_during_steps(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    handler, codes = signal.getsignal(signal.SIGTERM), queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    with StopAtOnce():
        with StopWhenAsked() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted):
                turn(asked)
        assert codes.empty()
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes.get(timeout=60) == stopping.PREEMPTED and codes.empty()
        assert capfd.readouterr().err.endswith("stopped as requested: run the same command again to resume\n")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert signal.set_wakeup_fd(-1) == -1


_BLOCKED = """
import ctypes, fcntl, os, signal, threading
from mono_jax.training.callbacks.stopping import StopAtOnce
with StopAtOnce():
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.wait()
    # The signal does not interrupt the main thread's call, as if it had come just before.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("waiting", flush=True)
    {}
"""


@pytest.mark.parametrize(
    "call",
    ["fcntl.flock(open({!r}), fcntl.LOCK_EX)", "threading.Semaphore(0).acquire()", "ctypes.CDLL(None).sleep(600)"],
    ids=["file", "lock", "native"],
)
def test_a_command_stops_at_once_in_a_call_that_is_not_interrupted(call: str, tmp_path: Path):
    """The signal of a forked process ends nobody else."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = _BLOCKED.format(call.format(lock.name))
        with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as process:
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=60)
    said = "stopped as requested: run the same command again to resume\n"
    assert (process.returncode, error) == (stopping.PREEMPTED, said)


def turn(stopping: StopWhenAsked, done: int = 3) -> None:
    """Does what the loop does after a step."""
    progress = Progress(None, {}, 0, done, 7)
    progress.totals.add(done, stopping.facts(progress))
    stopping.step(progress)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(number: int, capfd: pytest.CaptureFixture[str]):
    handlers, hurried = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], []
    with StopWhenAsked(lambda: hurried.append(True)) as asked:
        turn(asked)
        os.kill(os.getpid(), number)
        said = "stopping after this step"
        assert capfd.readouterr().err == said + (
            "; press Ctrl-C again to stop at once, without saving\n" * (number == signal.SIGINT) or "\n"
        )
        assert hurried == [True]
        with pytest.raises(Preempted, match="stopped at step 4 as requested; saved"):
            turn(asked, 4)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_only_a_second_ctrl_c_interrupts():
    with StopWhenAsked() as asked:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat signals
        with pytest.raises(Preempted):
            turn(asked)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopWhenAsked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Preempted):
            turn(asked)
