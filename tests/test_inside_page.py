"""docs/findings/inside.md agrees with docs/findings/inside/robustness.json."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mono_jax.evaluation.robustness.broken import BROKEN
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES
from mono_jax.evaluation.robustness.placeholders import ODD

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("make_inside", ROOT / "docs/make_inside.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    shutil.copy(make.PAGE, tmp_path)
    monkeypatch.setattr(make, "PAGE", tmp_path / "inside.md")
    make.main([])
    assert make.PAGE.read_text() == (ROOT / "docs/findings/inside.md").read_text(), "run python docs/make_inside.py"
    pictures = {f"{name}.png" for kept in make.KEPT.values() for name in kept.values()}
    assert {file.name for file in make.FOLDER.glob("*.png")} == pictures
    result = json.loads((make.FOLDER / "robustness.json").read_text())
    assert set(result["curves"]) == {*CHANGES, *ARRANGEMENTS} and result["unexpected"] == []
    assert set(result["broken"]) == set(BROKEN) and set(result["placeholders"]) == set(ODD)
