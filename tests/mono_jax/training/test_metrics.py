from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mono_jax.training import metrics


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3s"), (185, "3m05s"), (7620, "2h07m"), (4 * 86400 + 3 * 3600, "4d03h")]
)
def test_durations(seconds: float, text: str):
    assert metrics.duration(seconds) == text


def test_records_of_lost_steps_are_dropped_on_resume(tmp_path: Path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with metrics.MetricsWriter(tmp_path, start_step=2) as writer:
        writer.write({"step": 3, "loss": float("nan")})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None},
    ]


@pytest.mark.parametrize(
    ("losses", "found", "shown"),
    [
        ([], None, "unknown"),
        ([math.nan], None, "unknown"),
        ([3.0, 2.25], 2.25, "2.250"),
        ([3.0, 2.25, math.nan], 2.25, "2.250"),
        ([3.0, math.inf, -math.inf], 3.0, "3.000"),
    ],
)
def test_the_newest_finite_value(tmp_path: Path, losses: list[float], found: float | None, shown: str):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step, loss in enumerate(losses, 1):
            writer.write({"step": step, "loss": loss})
        writer.write({"step": len(losses) + 1, "heldout/captions": 1.0})
    value = metrics.newest(metrics.read_metrics(tmp_path / "metrics.jsonl"), "loss")
    assert (value, metrics.decimal(value, 3)) == (found, shown)


def test_console_line_has_what_users_watch():
    record = {"step": 20, "loss": 2.5, "grad_norm": 0.7, "lr": 2e-4, "tokens_per_s": 12345.6, "mfu": 0.412}
    line = metrics.console_line("S1.1", 300, record | {"data_wait": 0.01, "eta_s": 61, "skipped": 2})
    for part in (
        "S1.1",
        " 20/300",
        "loss 2.5000",
        "2.00e-04",
        "12,346 tokens/s",
        "MFU 41.2%",
        "1m01s",
        "skipped updates 2",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({}, None),
        ({"samples": 9, "bad_samples": 0}, None),
        (
            {"samples": 1997, "bad_samples": 3, "bad/too_long": 1, "bad/truncated": 2},
            "3 of 2,000 (truncated 2, too_long 1)",
        ),
        (
            {"samples": 0, "bad_samples": 10, "bad/a": 1, "bad/b": 2, "bad/c": 3, "bad/d": 4},
            "10 of 10 (d 4, c 3, b 2, ...)",
        ),
    ],
)
def test_bad_samples_stand_on_the_console_by_reason(counts, shown):
    record = {"step": 3, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1.0, "data_wait": 0.0, "eta_s": 1.0}
    line = metrics.console_line("S1.1", 10, record | counts)
    assert line.endswith(f"bad samples {shown}") if shown else "bad samples" not in line
