"""Keeps a worker running: if it dies or hangs, its current point is lost and another worker takes over."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from experiments.benchmarks.kernels.results import Results
from experiments.benchmarks.kernels.worker import RESTART
from mono_jax import cli

GRACE_S = 30.0  # how long after the end of the budget the current point is given up


def supervise(options: argparse.Namespace, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs workers until one finishes the list or the budget is spent.

    Args:
      options: of the command line; ``out``, ``budget_s`` and ``stall_s`` are used.
      command: starts a worker; the remaining budget and other options that change are appended.
      environment: of the worker.
    """
    start, retry, idle_deaths = time.monotonic(), options.retry_failed, 0
    while (left := options.budget_s - (time.monotonic() - start)) > 0:
        again = ["--retry_failed"] if retry else []
        status = _watch([*command, f"--budget_s={left}", *again], environment, options, left + GRACE_S)
        if status == 0 or status is None:
            return
        if status == cli.USER_ERROR:
            raise SystemExit(status)  # the worker has reported the reason
        results = Results.load(options.out)
        if results and "running" in results.content:
            reason = status if isinstance(status, str) else f"its process died with status {status}"
            print(f"  {reason}", file=sys.stderr)
            results.end({"failed": reason, "died": True})
            idle_deaths = 0
        elif status != RESTART:
            idle_deaths += 1
            if idle_deaths == 2:
                cli.fail(f"the worker process ends with status {status} before its first point")
        retry = False


def _watch(
    command: Sequence[str], environment: Mapping[str, str], options: argparse.Namespace, limit_s: float
) -> int | str | None:
    """Exit status of a worker, or why it was ended; None if the budget ended it."""
    started = progress = time.time()
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(1.0, options.stall_s / 4))
            with contextlib.suppress(FileNotFoundError):
                progress = max(progress, (options.out / "kernels.json").stat().st_mtime)
            if time.time() - started > limit_s:
                return None
            if time.time() - progress > options.stall_s:
                return f"no progress for {options.stall_s:g} s"
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may block a process that hangs in it
            process.wait(timeout=GRACE_S)
