"""A run's output: on the console of the first process and, with several processes, also in WORKDIR/logs/."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from mono_jax.training.metrics import Say


def say_now(line: str) -> None:
    """Prints a line immediately, even into a pipe."""
    print(line, flush=True)


def say_in(workdir: Path) -> Say:
    """``say_now``; with several processes, each writes to its own file WORKDIR/logs/process-N.log, and the first also
    prints."""
    if jax.process_count() == 1:
        return say_now
    file = workdir / "logs" / f"process-{jax.process_index()}.log"

    def say(line: str) -> None:
        if jax.process_index() == 0:
            say_now(line)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except OSError:  # only a log for people: not a reason to end a run
            pass

    return say
