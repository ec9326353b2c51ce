"""A run whose workdir lies on a real disk that is full for a while, or until the run ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mono_jax.errors import CheckpointError
from mono_jax.runs.config import RunConfig
from mono_jax.runs.stage import run_stage
from tests.devices import simulated
from tests.mono_jax.runs.test_stage import losses, same_weights, settings

ROOM = 16 * 2**20  # bytes, more than these runs take
UNSHARE = ("unshare", "--map-root-user", "--mount")


def mounted(folder: Path) -> list[str] | None:
    """The beginning of a command that finds a small disk of its own at ``folder``; None if nothing can be mounted."""
    mount = f"mount -t tmpfs -o size={ROOM} disk {folder}"
    if shutil.which(UNSHARE[0]) is None:
        return None
    if subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True).returncode:
        return None
    return [*UNSHARE, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def fill(file: Path) -> None:
    """Takes all the room that is left."""
    with file.open("wb", buffering=0) as handle:
        try:
            while handle.write(bytes(512)):
                pass
        except OSError:
            pass


def train(config: RunConfig, workdir: Path, full: tuple[int, int] | None) -> dict[str, Any]:
    """A run; the disk is full between the records of two steps. A run that fails is done again, with room.

    Returns what the test asks for.
    """
    ballast, lines, error = workdir.parent / "ballast", [], None

    def say(line: str) -> None:
        lines.append(line)
        if full is not None and f" step {full[0]}/" in line:
            fill(ballast)
        if full is not None and f" step {full[1]}/" in line:
            ballast.unlink()

    try:
        result = run_stage(config, workdir, say=say)
    except CheckpointError as failure:
        error = str(failure)
        ballast.unlink()
        result = run_stage(config, workdir, say=lines.append)
    return {"lines": lines, "error": error, "failed_saves": result["failed_saves"]}


def test_a_full_disk_costs_nothing(sets: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    if (command := mounted(tmp_path / "disk")) is None:
        pytest.skip("no disk can be mounted here")
    (tmp_path / "config.json").write_text(json.dumps(settings(sets, steps=8, async_checkpoints=False)))
    done = subprocess.run(
        [*command, sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"XLA_FLAGS": simulated(1), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name in ("moment", "long"):
        assert any(
            "step 4 was not saved" in line and "failed saves so far: 1" in line for line in results[name]["lines"]
        )
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        assert same_weights(str(tmp_path / name / "model"), str(tmp_path / "whole" / "model"))
    assert results["moment"]["error"] is None and results["moment"]["failed_saves"] == 1
    assert "step 8 was not saved" in results["long"]["error"]
    assert any("resuming" in line for line in results["long"]["lines"])


def main(folder: Path) -> None:
    """In a process that has the disk at FOLDER/disk."""
    config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    results = {}
    for name, full in {"whole": None, "moment": (3, 6), "long": (3, 99)}.items():
        workdir = folder / "disk" / name
        results[name] = train(config, workdir, full)
        shutil.copytree(workdir, folder / name)
        shutil.rmtree(workdir)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
