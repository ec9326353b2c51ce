"""Faults around a whole run: two trainers on one folder, lost or damaged files, steps left out, no memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mono_jax.errors import CheckpointError, ConfigError
from mono_jax.runs import stage
from mono_jax.runs.config import RunConfig
from mono_jax.runs.program import Program
from mono_jax.runs.workdir import locked
from tests.mono_jax.runs.test_stage import losses, run, same_weights, settings

pytestmark = pytest.mark.usefixtures("one_device")

HOLDER = """
import sys, time
from pathlib import Path
from mono_jax.runs.workdir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_workdir_in_use_names_its_holder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by pid {holder.pid} on host .* since 20"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match="cannot be used as a working directory"),
        locked(tmp_path / "file" / "run"),
    ):
        pass


@pytest.fixture(scope="module")
def four_steps(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("four") / "run"
    return workdir, run(settings(sets, steps=4), workdir)


def copy_of(workdir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workdir, tmp_path / "copy"))


def go_back(workdir: Path, step: int) -> None:
    """As after a kill following the checkpoint of ``step``."""
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    shutil.rmtree(workdir / "model")


def test_a_damaged_or_missing_base_is_made_again(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workdir, finished = four_steps
    copy = copy_of(workdir, tmp_path)
    go_back(copy, 2)
    [base] = (copy / "base").iterdir()
    largest = max((file for file in base.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    result = run(settings(sets, steps=4), copy)
    assert losses(copy) == losses(workdir) and same_weights(result["model"], finished["model"])
    go_back(copy, 2)
    shutil.rmtree(copy / "base")
    result = run(settings(sets, steps=4), copy)
    assert losses(copy) == losses(workdir) and same_weights(result["model"], finished["model"])


def test_lost_checkpoints_are_not_started_over_in_silence(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy = copy_of(four_steps[0], tmp_path)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint is left, but .*metrics\.jsonl shows 4 steps"):
        run(settings(sets, steps=4), copy)


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workdir, finished = four_steps
    copy = copy_of(workdir, tmp_path)
    for name in ("checkpoints", "model", "base"):
        shutil.rmtree(copy / name)
    (copy / ".checkpointed").unlink()  # as it was while the first was being committed
    result = run(settings(sets, steps=4), copy)
    assert losses(copy) == losses(workdir) and same_weights(result["model"], finished["model"])


@pytest.mark.parametrize("marker", [b"", b"[]", b'{"step": "x"}', b"\xff"])
def test_a_damaged_model_of_a_finished_run_is_written_again(
    marker: bytes, sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workdir, finished = four_steps
    copy = copy_of(workdir, tmp_path)
    (copy / "model" / "step.json").write_bytes(marker)
    weights = max((copy / "model" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    weights.write_bytes(b"")
    result = run(settings(sets, steps=4), copy)
    assert same_weights(result["model"], finished["model"])


def test_the_config_as_it_runs_now_and_as_it_ran_first(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy = copy_of(four_steps[0], tmp_path)
    run(settings(sets, steps=5, log_every=2), copy)
    now, first = (json.loads((copy / name).read_text()) for name in ("config.json", "config.initial.json"))
    assert (now["steps"], now["log_every"]) == (5, 2) and (first["steps"], first["log_every"]) == (4, 1)


def test_steps_left_out_train_on_nothing(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = run(settings(sets, steps=4, skip_steps=[[2, 3]]), tmp_path / "run")
    found, whole = dict(losses(tmp_path / "run")), dict(losses(four_steps[0]))
    assert found[1] == whole[1] and found[2] == found[3] == 0.0 and found[4] != whole[4]
    assert result["skipped_updates"] == 0


def test_the_loss_of_a_run_is_the_newest_finite_one(
    sets: dict[str, Any], four_steps: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy = copy_of(four_steps[0], tmp_path)
    *others, last = (copy / "metrics.jsonl").read_text().splitlines()
    skipped = json.dumps(json.loads(last) | {"loss": None})
    (copy / "metrics.jsonl").write_text("\n".join([*others, skipped]) + "\n")
    assert run(settings(sets, steps=4), copy)["loss"] == json.loads(others[-1])["loss"]


def test_no_memory_on_the_device_is_one_line_that_names_what_decides_it(sets: dict[str, Any]) -> None:
    config = RunConfig.from_dict(settings(sets))
    program = Program.build(config)
    with pytest.raises(ConfigError, match="out of memory") as caught, stage.explained(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    for name in ("batch_size", "grad_accum_steps", "remat", "loss_chunk", "attention", "mesh"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), stage.explained(program):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_records_say_what_was_read(four_steps: tuple[Path, dict[str, Any]]) -> None:
    record = json.loads((four_steps[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["samples"] > 0 and record["bad_samples"] == 0 and record["time"] > 1e9
    assert np.isfinite(record["loss"])
