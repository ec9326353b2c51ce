"""Processes that die."""

from __future__ import annotations

import os
import signal

from data_pipelines.io.processes import in_processes


def fatal(number: int) -> int:
    """Kills its process for two of the numbers, the second time long after the start."""
    if number in (1, 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_costs_only_what_kills_it() -> None:
    found = list(in_processes(fatal, [(i,) for i in range(12)], 3))
    assert found == [None if i in (1, 9) else i for i in range(12)]
