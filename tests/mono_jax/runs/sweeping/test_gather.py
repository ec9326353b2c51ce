"""Means, intervals and files of a sweep, compared with scipy's tests; states of units."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from mono_jax.errors import CheckpointError, ConfigError
from mono_jax.runs.sweeping import running
from mono_jax.runs.sweeping.chain import Plan, plans
from mono_jax.runs.sweeping.gather import difference, gather
from mono_jax.runs.sweeping.places import is_trained, lay_out, share, shared_folder
from mono_jax.runs.sweeping.seeds import MeanOfSeeds
from mono_jax.runs.sweeping.status import state_of
from mono_jax.runs.sweeping.units import Sweep, read_sweep
from mono_jax.runs.workdir import locked
from mono_jax.training.metrics import MetricsWriter


@pytest.fixture
def sweep(sweep_file: Path) -> Sweep:
    return read_sweep(sweep_file)


def finish(workdir: Path, plan: Plan, **metrics: float) -> None:
    unit, folder = plan.unit, lay_out(workdir, plan)
    result = {"unit": unit.name, "group": unit.group, "seed": unit.seed, "changes": unit.changes, "metrics": metrics}
    result |= plan.decides
    (folder / "result.json").write_text(json.dumps(result))


def test_intervals_are_those_of_t_tests():
    values, others = np.random.default_rng(0).normal(3, 2, (2, 5))
    estimate, interval = MeanOfSeeds.of(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([estimate.mean - estimate.half, estimate.mean + estimate.half], interval)
    table = {"a": dict(enumerate(values)), "b": dict(enumerate(others)) | {9: 1.0}}
    apart, paired = difference(table, "b", "a"), stats.ttest_rel(others, values).confidence_interval(0.95)
    np.testing.assert_allclose([apart.mean - apart.half, apart.mean + apart.half], paired)
    assert apart.is_clear == (not paired.low <= 0 <= paired.high) and apart.n == 5
    assert difference(table, "a", "a") is None and MeanOfSeeds.of([2.0]) == MeanOfSeeds(2.0, None, 1)
    assert not MeanOfSeeds.of([2.0]).is_clear and MeanOfSeeds.of([1.0, 1.1]).is_clear


def test_results_of_what_is_finished_and_names_of_what_is_not(sweep: Sweep, tmp_path: Path):
    planned, workdir = plans(sweep), tmp_path / "work"
    with pytest.raises(ConfigError, match=r"no unit of .* is finished"):
        gather(sweep, planned, workdir, [], print)
    finish(workdir, planned[0], loss=2.0, constant=1.0)
    finish(workdir, planned[1], loss=4.0, constant=1.0)
    finish(workdir, planned[3], loss=3.5, constant=1.0)
    said: list[str] = []
    found = gather(sweep, planned, workdir, [], said.append)
    assert found["missing"] == {"high-seed0": "waiting", "short": "waiting"}
    assert (found["finished"], found["metrics"]) == (3, ["loss"])
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["unit"], row["seed"], row["loss"]) for row in rows] == [
        ("low-seed0", "0", "2.0"), ("low-seed1", "1", "4.0"), ("high-seed1", "1", "3.5")
    ]  # fmt: skip
    assert rows[2]["stages.s2.optim.learning_rate"] == "0.01" and rows[0]["stages.s2.optim.learning_rate"] == ""
    with (workdir / "summary.csv").open() as file:
        low, high = csv.DictReader(file)
    assert (low["n"], low["mean"], low["difference"]) == ("2", "3.0", "")
    assert float(low["half_width_95"]) == pytest.approx(stats.t.ppf(0.975, 1))
    assert (high["n"], high["half_width_95"], high["difference"]) == ("1", "", "-0.5"), "of the seed that both have"
    assert "Missing: high-seed0 (waiting), short (waiting)." in (workdir / "summary.md").read_text() == said[-1]
    assert image.imread(workdir / "loss.png").std() > 0
    assert gather(sweep, planned, workdir, ["con"], said.append)["metrics"] == ["constant"]
    with pytest.raises(ConfigError, match="did you mean 'loss'"):
        gather(sweep, planned, workdir, ["lass"], print)


@pytest.mark.parametrize(
    ("values", "n", "left_out"),
    [
        ((1.0, 2.0), 2, {}),
        ((1.0, None), 1, {"low-seed1": "not finite"}),
        ((math.nan, 2.0), 1, {"low-seed0": "not finite"}),
        ((math.inf, -math.inf), 0, {"low-seed0": "not finite", "low-seed1": "not finite"}),
        ((1.0, "absent"), 1, {"low-seed1": "not measured"}),
        ((None, "absent"), 0, {"low-seed0": "not finite", "low-seed1": "not measured"}),
        (("absent", "absent"), 0, {}),  # of other stages
    ],
)
def test_values_that_are_not_finite_are_left_out_counted_and_named(
    sweep: Sweep, tmp_path: Path, values: tuple[Any, Any], n: int, left_out: dict[str, str]
):
    planned, workdir = plans(sweep), tmp_path / "work"
    for plan, value in zip(planned, values):
        finish(workdir, plan, **({} if value == "absent" else {"loss": value}))
    finish(workdir, planned[2], loss=3.0)
    found = gather(sweep, planned, workdir, [], print)
    assert found["left_out"] == ({"loss": left_out} if left_out else {})
    with (workdir / "summary.csv").open() as file:
        assert {row["group"]: row["n"] for row in csv.DictReader(file)} == {"high": "1"} | (
            {"low": str(n)} if n else {}
        )
    named = ", ".join(f"{name} ({why})" for name, why in left_out.items())
    assert (f"Left out: {named}." in (workdir / "summary.md").read_text()) == bool(left_out)
    with (workdir / "results.csv").open() as file:
        written = [row["loss"] for row in csv.DictReader(file)]
    assert written[:2] == [str({"absent": "", None: "nan"}.get(value, value)) for value in values]


def test_metrics_of_a_unit_keep_those_that_are_not_finite(tmp_path: Path):
    """Those that a stage does not have are left out."""
    summary = {"loss": None, "text_loss_before": None, "text_loss_after": math.nan, "trainable": 5}
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "heldout/text": 2.0, "heldout/captions": 3.0})
        writer.write({"step": 2, "heldout/text": math.inf, "grad_norm": math.nan})
    found = running.stage_metrics(summary, tmp_path, "s2/")
    measured = {"s2/heldout/text": None, "s2/heldout/captions": 3.0}
    assert found == {"s2/loss": None, "s2/text_loss_after": None, "s2/trainable": 5, **measured}


def test_states_of_units(sweep: Sweep, sweep_file: Path, tmp_path: Path):
    planned, workdir = plans(sweep), tmp_path / "work"
    assert state_of(workdir, planned[0]).state == "waiting"
    folder = lay_out(workdir, planned[0])
    first, second, _ = planned[0].stages
    assert (folder / "s0").readlink() == Path(f"../../shared/{first.name}")
    shared_folder(workdir, first).mkdir(parents=True)
    (folder / "s0" / "summary.json").write_text("{}")
    shared_folder(workdir, second).mkdir()
    (folder / "s1_1" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    state = state_of(workdir, planned[0])
    assert (state.state, state.stage, state.step, state.loss) == ("partly", "s1_1", 1, 2.5)
    assert state_of(workdir, planned[2]).stage == "s1_1", "the beginning is shared"
    (folder / "failed.json").write_text('{"error": "OSError: full"}')
    assert (state_of(workdir, planned[0]).state, state_of(workdir, planned[0]).note) == ("failed", "OSError: full")
    with locked(folder):
        assert state_of(workdir, planned[0]).state == "running"
    finish(workdir, planned[0], loss=1.0)
    assert state_of(workdir, planned[0]).state == "finished"
    sweep_file.write_text(sweep_file.read_text().replace('"low", seeds=2', '"low", {"stages.s0.steps": 9}, seeds=2'))
    changed = plans(read_sweep(sweep_file))[0]
    assert state_of(workdir, changed).state == "failed", "its result is of another config"
    assert lay_out(workdir, changed) == folder and (folder / "s0").readlink().name == changed.stages[0].name


@pytest.mark.parametrize("key", ["heldout_questions", "heldout_batches", "answer_tokens", "gallery"])
def test_a_unit_that_is_asked_otherwise_is_not_finished(write_sweep: Callable[[str], Path], tmp_path: Path, key: str):
    """Neither another unit with the same stages, nor the same unit after a change in the file."""
    body = "def sweep(add):\n    add('a')\n    add('b', {{'{}': {}}})\n"
    first, second = plans(read_sweep(write_sweep(body.format(key, 2))))
    assert first.stages == second.stages and first.decides != second.decides
    finish(tmp_path, second)
    assert state_of(tmp_path, second).state == "finished"
    _, changed = plans(read_sweep(write_sweep(body.format(key, 3))))
    assert state_of(tmp_path, changed).state != "finished"


def test_sweeps_share_their_stages(sweep: Sweep, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    planned = plans(sweep)[0]
    for workdir in (first, second, second):
        share(workdir, tmp_path / "both")
        lay_out(workdir, planned)
    stage = planned.stages[0]
    shared_folder(first, stage).mkdir()
    (first / "units" / planned.unit.name / stage.folder / "summary.json").write_text("{}")
    assert is_trained(second, stage)
    with pytest.raises(CheckpointError, match="second/shared: this sweep keeps its stages there"):
        share(second, tmp_path / "others")
