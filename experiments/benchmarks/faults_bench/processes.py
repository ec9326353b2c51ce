"""Process faults: killed, asked to stop, started twice, resumed on other devices."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks.faults_bench.trainer import SAVE_EVERY, STEPS, Process, Trainer, children, ended, wait_until

PREEMPTED = 75
INTERRUPTED = 130


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def logged(trainer: Trainer, steps: int) -> Callable[[], bool]:
    return lambda: len(trainer.losses()) >= steps


def any_moment(trainer: Trainer, rng: random.Random) -> Callable[[], bool]:
    """After some seconds (start, compilation) or some steps."""
    return after(rng.uniform(0, 6)) if rng.random() < 0.4 else logged(trainer, rng.randint(1, STEPS - 1))


def said(trainer: Trainer, text: str) -> Callable[[], bool]:
    """Whether the run has printed ``text`` from now on."""
    before = len(trainer.output())
    return lambda: text in trainer.output()[before:]


def kill_at(trainer: Trainer, condition: Callable[[], bool]) -> None:
    process = trainer.start()
    trainer.struck = wait_until(condition, process, trainer.longest)
    _signal(process, signal.SIGKILL)
    ended(process)


def stop_at(trainer: Trainer, condition: Callable[[], bool]) -> int:
    """Asks a run to stop, so that it saves; returns its exit code."""
    process = trainer.start()
    trainer.struck = wait_until(condition, process, trainer.longest)
    _signal(process, signal.SIGTERM)
    return ended(process, trainer.longest)


def _signal(process: Process, number: int) -> None:
    """Sends a signal to the whole session, as a terminal or a scheduler does."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # its session does not exist yet, or no longer
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


# ------------------------------------------------------------------ killed


def kill(trainer: Trainer, rng: random.Random) -> None:
    kill_at(trainer, any_moment(trainer, rng))


def kill_commit(trainer: Trainer, rng: random.Random) -> None:
    """While a checkpoint is written, or when it is in place with or without its checksum list."""
    wanted, saved = SAVE_EVERY * rng.randint(1, STEPS // SAVE_EVERY - 1), trainer.workdir / "checkpoints"
    place = saved / str(wanted)
    moments = (lambda: any(saved.glob(f"{wanted}.*")), place.is_dir, (place / "checksums.json").exists)
    reached, pause = rng.choice(moments), rng.uniform(0, 0.1) * rng.randint(0, 1)

    def committing() -> bool:
        if not reached():
            return False
        time.sleep(pause)
        return True

    kill_at(trainer, committing)


def kill_cache(trainer: Trainer, rng: random.Random) -> None:
    """While the index of a shard, the lengths and the plan are made."""
    shards, cache = trainer.own_sets().parent, trainer.workdir / "cache"
    files = rng.randint(1, 5)

    def made() -> bool:
        return sum(1 for folder in (shards, cache) if folder.is_dir() for _ in folder.rglob("*")) > files

    kill_at(trainer, made)


def kill_write(trainer: Trainer, rng: random.Random) -> None:
    """While the frozen base or the result is written."""
    name = rng.choice(("base", "model"))
    folder, files = trainer.workdir / name, rng.randint(0, 20)
    kill_at(trainer, lambda: folder.is_dir() and sum(1 for _ in folder.rglob("*")) >= files)


def kill_resume(trainer: Trainer, rng: random.Random) -> None:
    """Killed, and killed again while it resumes."""
    kill_at(trainer, logged(trainer, rng.randint(2, STEPS - 1)))
    kill_at(trainer, after(rng.uniform(0, 4)))


def kill_parent(trainer: Trainer, rng: random.Random) -> str | None:
    """Kills only the trainer; its data workers must end, too."""
    trainer.options = ("--config.data.workers=1",)
    process = trainer.start()
    trainer.struck = wait_until(logged(trainer, rng.randint(1, STEPS - 1)), process)
    workers = children(process.pid)
    _kill(process.pid)
    ended(process)
    trainer.options = ()
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(_runs, workers)):
        time.sleep(0.05)
    left = list(filter(_runs, workers))
    for pid in left:
        _kill(pid)
    return f"{len(left)} workers outlive their parent" if left else None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_worker(trainer: Trainer, rng: random.Random) -> str | None:
    """The run replaces the killed worker and continues."""
    trainer.options = ("--config.data.workers=1", "--config.data.prefetch=1")
    process = trainer.start()
    trainer.struck = wait_until(logged(trainer, rng.randint(1, STEPS - 2)), process)
    if workers := children(process.pid):
        _kill(rng.choice(workers))
    code = ended(process)
    trainer.options = ()
    return None if code == 0 else f"a killed worker ends the run with {code}"


# ------------------------------------------------------------------ asked to stop


def _asked(trainer: Trainer, rng: random.Random, moment: Callable[[], bool], *signals: int, **start: str) -> str | None:
    process = trainer.start(**start)
    trainer.struck = wait_until(moment, process)
    for number in signals:
        _signal(process, number)
        time.sleep(rng.uniform(0, 0.3))
    code = ended(process, 120)
    allowed = {0, PREEMPTED}
    if len(signals) > 1:  # the second interrupts, or arrives when everything is saved and the process is exiting
        allowed |= {INTERRUPTED, -signals[1]}
    return unsaved(trainer, code) if code in allowed else f"exit code {code} after {len(signals)} signals"


def unsaved(trainer: Trainer, code: int) -> str | None:
    """The problem if the exit code claims that the run is saved and it is not."""
    reached, saved = max(dict(trainer.losses()), default=0), max(trainer.saved(), default=0)
    return f"exit code {code}, but step {reached} is not saved" if code == PREEMPTED and saved < reached else None


def term_start(trainer: Trainer, rng: random.Random) -> str | None:
    """Before compilation; as long as there is nothing to save, the signal may just end the run."""
    process = trainer.start(command=rng.random() < 0.1)
    trainer.struck = wait_until(after(rng.uniform(0, 1.5)), process)
    _signal(process, signal.SIGTERM)
    code = ended(process, 120)
    return unsaved(trainer, code) if code in (0, PREEMPTED, -signal.SIGTERM) else f"exit code {code} after SIGTERM"


def term_compile(trainer: Trainer, rng: random.Random) -> str | None:
    """During compilation, sometimes without the compilation cache."""
    start = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if rng.random() < 0.1 else {}
    return _asked(trainer, rng, said(trainer, "compiling the step"), signal.SIGTERM, **start)


def term(trainer: Trainer, rng: random.Random) -> str | None:
    return _asked(trainer, rng, logged(trainer, rng.randint(1, STEPS - 1)), signal.SIGTERM)


def term_twice(trainer: Trainer, rng: random.Random) -> str | None:
    moment = said(trainer, "compiling the step") if rng.random() < 0.3 else logged(trainer, rng.randint(1, STEPS - 1))
    return _asked(trainer, rng, moment, signal.SIGTERM, signal.SIGTERM)


def interrupt(trainer: Trainer, rng: random.Random) -> str | None:
    """Ctrl-C; twice: ends at once without saving."""
    signals = [signal.SIGINT] * rng.randint(1, 2)
    return _asked(trainer, rng, logged(trainer, rng.randint(1, STEPS - 1)), *signals)


# ------------------------------------------------------------------ others


def second(trainer: Trainer, rng: random.Random) -> str | None:
    """Another trainer on the same workdir is refused and disturbs nothing."""
    process = trainer.start()
    trainer.struck = wait_until(said(trainer, "compiling the step"), process)
    other = ended(trainer.start())
    code = ended(process)
    told = f"in use by pid {process.pid}" in trainer.output()
    return None if code == 0 and ((other == 2 and told) or not trainer.struck) else f"exit codes {code} and {other}"


def devices(trainer: Trainer, rng: random.Random) -> None:
    """On 1, 8, 2 and again 8 simulated devices."""
    for count in (1, 8, 2):
        trainer.devices = count
        process = trainer.start()
        reached = len(trainer.losses()) + 1
        trainer.struck &= wait_until(logged(trainer, min(reached, STEPS - 1)), process)
        _signal(process, signal.SIGTERM)
        ended(process)
    trainer.devices = 8
