"""A sweep from its file to its tables, stopped in between, and the same stages trained by evip.py."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mono_jax.files import read_json
from mono_jax.weights.model_folder import load_model
from tests.devices import simulated
from tests.mono_jax.stored import assert_equal

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({config!r})
"""
SWEEP = """
CONFIG = {file!r}
def sweep(add):
    add("two", seeds=2)
    add("without_s1_1", {{"stages": ["s0", "s2"]}}, seeds=2)
"""


@pytest.fixture
def config(sets_dir: Path) -> dict[str, Any]:
    data = {"max_tiles": 1, "system_message": "", "batch_size": 2, "visual_tokens": 32, "text_tokens": 96}
    text = {"visual_tokens": 0, "text_tokens": 64}
    return {
        "sets": {"kind": "folder", "path": str(sets_dir)},
        "vision": {"hidden_size": 32, "patch_size": 8, "image_size": 64},
        "common": {"dtype": "float32", "log_every": 1, "checkpoint_every": 2},
        "data": data,
        "stages": {
            "s0": {"stage": "S0", "steps": 4, "model": {"preset": "tiny_lm"}, "data": text},
            "s1_1": {"stage": "S1.1", "steps": 4},
            "s2": {"stage": "S2", "steps": 4},
        },
    }


def command(file: str, workdir: Path, *options: str) -> subprocess.Popen[str]:
    line = [sys.executable, f"experiments/{file}", *options, f"--workdir={workdir}", "--json"]
    env = os.environ | {"XLA_FLAGS": simulated(1), "JAX_PLATFORMS": "cpu"}  # one device
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(action: str, file: Path, workdir: Path, *options: str) -> subprocess.Popen[str]:
    return command("sweep.py", workdir, action, str(file), *options)


def last_json(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_a_sweep_stopped_on_the_way_gives_what_its_units_give_alone(config: dict[str, Any], tmp_path: Path):
    (tmp_path / "config.py").write_text(CONFIG.format(config=config))
    file, workdir = tmp_path / "skip.py", tmp_path / "work"
    file.write_text(SWEEP.format(file=str(tmp_path / "config.py")))
    running = sweep("run", file, workdir, "--jobs=2")
    while not list(workdir.glob("shared/s0-*/checkpoints/2")) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate()
    assert running.returncode == 75 and "run again to continue" in err
    assert last_json(sweep("status", file, workdir))["counts"].get("finished", 0) < 4
    assert last_json(sweep("run", file, workdir, "--jobs=2"))["failed"] == []
    assert len(list(workdir.glob("shared/s*-*/summary.json"))) == 2 * 4, "S0 is trained once for each seed"
    assert last_json(sweep("gather", file, workdir))["missing"] == {}
    with (workdir / "summary.csv").open() as table:
        rows = [row for row in csv.DictReader(table) if row["metric"] == "s2/loss"]
    assert [(row["group"], row["n"]) for row in rows] == [("two", "2"), ("without_s1_1", "2")]

    seeds = ("--config.common.seed=1", "--config.data.seed=1")
    last_json(command("evip.py", tmp_path / "alone", f"--config={tmp_path / 'config.py'}", *seeds))
    unit = workdir / "units" / "two-seed1"
    for folder in ("s0", "s1_1", "s2"):
        found, expected = (load_model(place / folder / "model")[1] for place in (unit, tmp_path / "alone"))
        assert_equal(found, expected)
    measured = read_json(unit / "result.json")["metrics"]
    for folder in ("s0", "s1_1", "s2"):
        summary = read_json(tmp_path / "alone" / folder / "summary.json")
        assert measured[f"{folder}/loss"] == summary["loss"]
        assert measured[f"{folder}/text_loss_after"] == summary["text_loss_after"]
    assert "s2/questions" in measured and "s1_1/questions" not in measured
