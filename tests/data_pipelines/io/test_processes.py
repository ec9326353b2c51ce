"""Processes that die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_pipelines.io.processes import in_processes


def fatal(number: int) -> int:
    """Kills its process for two of the numbers, the second time long after the start."""
    if number in (1, 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_costs_only_what_kills_it() -> None:
    found = list(in_processes(fatal, [(i,) for i in range(12)], 3))
    assert found == [None if i in (1, 9) else i for i in range(12)]


PACKAGE = Path(__file__).parents[3] / "data_pipelines"
POOLS = [file for file in PACKAGE.rglob("*.py") if "ProcessPoolExecutor(" in file.read_text()]


@pytest.mark.parametrize("file", POOLS, ids=lambda file: file.stem)
def test_workers_end_with_their_parent(file: Path) -> None:
    """A parent that is killed, or that stops at once on SIGTERM, does not shut its pools down."""
    assert "end_with_parent" in file.read_text()
