"""experiments/robustness.py on a tiny model with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import robustness as command
from mono_jax.errors import ConfigError
from mono_jax.evaluation.robustness.broken import BROKEN, File
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES
from mono_jax.evaluation.robustness.placeholders import ODD, Odd
from mono_jax.models.architecture import VisionConfig
from mono_jax.runs.robustness import run
from tests.experiments.test_inspect_model import saved


@pytest.mark.parametrize(
    ("native", "whole"),
    [(False, False), *(pytest.param(native, True, marks=pytest.mark.slow) for native in (False, True))],
)
def test_a_curve_for_each_change_and_an_outcome_for_each_file(
    sets: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    whole: bool,
):
    """``whole``: with all files and prompts instead of a few of each."""
    vision = VisionConfig(hidden_size=32, patch_size=8, image_size=64, native=native)
    model, asked, out = saved(tmp_path / "model", sets, vision=vision), sets["heldout"]["questions"], tmp_path / "out"
    flags = [f"--model={model}", f"--questions={asked['path']}", f"--images={asked['image_root']}", f"--out={out}"]
    chosen = ("blurred", "other_pictures")
    few = ("empty", "jpeg cut at 10 %", "webp", "at the end", "<IMG_CONTEXT> typed")
    files, prompts = ({n: every[n] for n in every if whole or n in few} for every in (BROKEN, ODD))
    monkeypatch.setattr(run, "BROKEN", files)
    monkeypatch.setattr(run, "ODD", prompts)
    command.main([*flags, "--limit=2", "--max_new_tokens=2", "--json", "--changes", *chosen])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: [point["level"] for point in points] for name, points in result["curves"].items()} == {
        name: list(each.levels) for name, each in {**CHANGES, **ARRANGEMENTS}.items() if name in chosen
    }
    assert all(point["n"] == 2 for points in result["curves"].values() for point in points)
    assert set(result["broken"]) == set(files) and set(result["placeholders"]) == set(prompts)
    assert result["unexpected"] == []
    assert result["broken"]["empty"] != "answered" and result["broken"]["webp"] == "answered"
    page = (out / "robustness.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "jpeg cut at 10 %" in page and "typed" in page
    lines = (out / "sets/other_pictures@2.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["image"]) for line in lines] == [3, 3]
    monkeypatch.setattr(run, "BROKEN", {"empty": File(lambda picture: b"", "not_an_image")})
    monkeypatch.setattr(run, "ODD", {"plain": Odd((("human", "what?"),), 1, "bad_conversation")})
    assert command.main([*flags, "--limit=2", "--max_new_tokens=2", "--changes", *chosen]) is None
    assert "not as expected: empty, plain" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean 'blurred'"):
        command.main([*flags, "--changes", "blured"])
