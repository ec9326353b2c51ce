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
from tests.mono_jax.runs.test_stage import losses, one_device, run, same_weights, settings

__all__ = ["one_device"]  # a fixture that pytest looks up by name

ROOM = 16 * 2**20  # bytes, more than a run takes
UNSHARE = ("unshare", "--map-root-user", "--mount")


def mounted(folder: Path) -> list[str] | None:
    """The beginning of a command that finds a small disk of its own at ``folder``; None if nothing can be mounted."""
    mount = f"mount -t tmpfs -o size={ROOM} disk {folder}"
    if (
        shutil.which(UNSHARE[0]) is None
        or subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True).returncode
    ):
        return None
    return [*UNSHARE, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def on_a_full_disk(file: Path, workdir: Path, until: int | None) -> None:
    """Runs the config in ``file``; the disk is full from the third step on, ``until`` a step or the end of the run.

    In the latter case the same run is done again. Prints what the parent asks for.
    """
    ballast, lines, failed = workdir.parent / "ballast", [], None

    def fill() -> None:
        with ballast.open("wb", buffering=0) as handle:
            try:
                while handle.write(bytes(512)):
                    pass
            except OSError:
                pass

    def say(line: str) -> None:
        lines.append(line)
        if " step 3/" in line:
            fill()
        if until is not None and f" step {until}/" in line:
            ballast.unlink()

    values = json.loads(file.read_text())
    config = RunConfig.from_dict(values)
    try:
        result = run_stage(config, workdir, say=say)
    except CheckpointError as error:
        failed = str(error)
        ballast.unlink()
        result = run_stage(config, workdir, say=lines.append)
    for name in ("metrics.jsonl", "model"):
        copy = shutil.copytree if name == "model" else shutil.copyfile
        copy(workdir / name, file.parent / name)
    print(json.dumps({"failed": failed, "lines": lines, "failed_saves": result["failed_saves"]}))


@pytest.fixture(scope="module")
def whole(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(settings(sets, steps=8), workdir)


@pytest.mark.parametrize("until", [6, None])
def test_a_full_disk_costs_nothing(
    until: int | None, sets: dict[str, Any], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    if (command := mounted(tmp_path / "disk")) is None:
        pytest.skip("no disk can be mounted here")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings(sets, steps=8)))
    done = subprocess.run(
        [*command, sys.executable, __file__, str(file), str(tmp_path / "disk" / "run"), str(until or "")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": ""},  # one device
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert any("step 4 was not saved" in line and "failed saves so far: 1" in line for line in result["lines"])
    if until is None:
        assert "step 8 was not saved" in result["failed"] and any("resuming" in line for line in result["lines"])
    else:
        assert result["failed"] is None and result["failed_saves"] == 1
    assert losses(tmp_path) == losses(whole[0])
    assert same_weights(str(tmp_path / "model"), whole[1]["model"])


if __name__ == "__main__":
    on_a_full_disk(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3] else None)
