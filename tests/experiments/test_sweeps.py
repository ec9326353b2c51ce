"""The sweeps shipped with the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from mono_jax.runs.sweeping.chain import idle, plans
from mono_jax.runs.sweeping.units import read_sweep

SWEEPS = sorted(
    file for file in (Path(__file__).parents[2] / "experiments" / "sweeps").glob("*.py") if file.stem != "__init__"
)


@pytest.mark.parametrize(
    "config",
    [None, pytest.param("experiments/configs/demo.py", marks=pytest.mark.slow)],
    ids=["its own config", "the demo"],
)
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_shipped_sweeps_can_be_planned(file: Path, config: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(file.parents[2])
    sweep = read_sweep(file, config)
    planned = plans(sweep)
    assert len(sweep.groups) > 1
    if config is None:  # with another config, a change may equal what it already has
        assert len({plan.stages for plan in planned}) == len(planned)
        assert [idle(plan) for plan in planned] == [{}] * len(planned)
    assert file.name in (file.parents[2] / "docs" / "sweeps.md").read_text()
