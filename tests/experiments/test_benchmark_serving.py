"""The serving benchmark: every point is measured and written, and its answers are Generator's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import serving
from experiments.benchmarks.first_token_bench.models import MODELS
from experiments.benchmarks.serving_bench import run


@pytest.mark.slow
def test_every_point_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tiles", "2", "--text=16", "--new_tokens=9", "--rounds=2", "--concurrency", "1", "3", "--requests=3")
    serving.main(["--preset=tiny", *sizes, f"--out={tmp_path}", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / run.FILE).read_text())
    assert printed == report
    kinds = [point["kind"] for point in report["points"]]
    assert kinds == ["first_token", "split", "concurrency_1", "concurrency_3", "one_by_one", "finished"]
    points = dict(zip(kinds, report["points"]))
    assert not any("failed" in point for point in points.values())
    assert all(point["input_tokens"] == 3 * 16 + 16 for point in points.values())  # two tiles and a thumbnail
    for name in MODELS:
        assert points["one_by_one"][name]["equal_answers"] == 3
        assert all(seconds >= 0 for seconds in points["split"][name].values())
        assert points["concurrency_3"][name]["tokens_per_s"] > 0
        assert points["concurrency_3"][name]["compilations"] == 0
    assert len(points["finished"]["step_s"]) == 2


def test_what_failed_is_told() -> None:
    point = {"kind": "split", "tiles": 1, "input_tokens": 80, "failed": "RuntimeError: no memory"}
    assert run._line(point) == "split of 1 tiles, 80 tokens in: failed: RuntimeError: no memory"
