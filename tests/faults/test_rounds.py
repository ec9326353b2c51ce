"""The benchmark of faults: rounds of every kind on the real command, and what is made of their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.faults_bench import rounds
from mono_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]


def record(fault: str, problem: str | None = None, **facts: Any) -> dict[str, Any]:
    values = {"round": 3, "fault": fault, "problem": problem, "struck": True, "hung": False, "line": "the last line"}
    return values | {"lost_steps": 0, "lost_records": 0} | facts


def test_records_are_summed_by_fault() -> None:
    records = [
        record("kill", lost_steps=2),
        record("term", "hangs", hung=True, lost_records=3),
        record("kill", lost_steps=1, struck=False),
    ]
    assert rounds._summed(records, {"disk_long": "no disk"}) == {
        "rounds": 3,
        "identical": 2,
        "lost_steps_max": 2,
        "lost_records": 3,
        "hangs": 1,
        "by_fault": {
            "kill": {"rounds": 2, "struck": 1, "identical": 2, "failures": []},
            "term": {"rounds": 1, "struck": 1, "identical": 0, "failures": ["round 3: hangs; the last line"]},
        },
        "skipped": {"disk_long": "no disk"},
    }


def test_tracebacks_of_late_writes_do_not_count() -> None:
    late = "Traceback (most recent call last)\n ...\nRuntimeError: Event loop is closed\n"
    assert rounds._tracebacks(late * 3) == 0
    assert rounds._tracebacks(late + "Traceback (most recent call last)\n ...\nKeyError: 3\n") == 1


def test_an_unknown_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kil"):
        rounds.run(1, ["kil"], 0, tmp_path)


@pytest.mark.slow
def test_after_one_round_of_each_kind_the_run_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "experiments/benchmarks/faults.py", "--json", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rounds"] == result["identical"] == len(rounds.FAULTS), result
    assert (result["lost_records"], result["hangs"]) == (0, 0)
